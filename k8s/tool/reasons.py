"""Why something is not ready yet: what pods, controllers and Ray Serve say, in one line each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from k8s.objects import Object
from k8s.tool.kinds import title

_HOPELESS: Final = ("InvalidImageName", "ErrImageNeverPull")
_STUCK: Final = (
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImagePullBackOff",
    "RunContainerError",
)
_SERVE_FAILED: Final = ("DEPLOY_FAILED", "UNHEALTHY")
_CONTROLLER_EVENTS: Final = ("FailedCreate", "FailedToCreateRayCluster", "InvalidRayServiceSpec", "FailedMount")

_SCHEDULING: Final = (
    (r"Insufficient (\S+)", "no node has enough {0} left: `argosy k8s capacity` says what each lacks"),
    (r"untolerated taint \{([^:}]+)", "nodes with the taint {0} are closed to this pod"),
    (r"didn't match Pod's node affinity/selector", "no node has the labels that the pod asks for"),
    (r"didn't match pod topology spread", "spreading it over zones needs nodes in another zone"),
    (r"unschedulable", "nodes are cordoned"),
    (r"unbound immediate PersistentVolumeClaims", "its volume is not there: look at the PersistentVolumeClaim"),
    (r"volume node affinity conflict", "its volume is in another zone than the nodes with room"),
    (
        r"cannot allocate all claims",
        "no node has enough of the devices left that it claims: compare `kubectl get resourceslices` with `kubectl get "
        "resourceclaims -A`",
    ),
    (r"device class (\S+) does not exist", "there is no DeviceClass {0}: cluster.device_class names it"),
    (r"Too many pods", "nodes have as many pods as they may"),
)
"""What the scheduler says -> what that means."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """is_stuck: waiting will not mend it, unless somebody changes something."""

    of: str
    text: str
    is_stuck: bool = False

    def __str__(self) -> str:
        return f"{self.of}: {self.text}"


def of_pods(pods: Iterable[Object], events: Iterable[Object] = ()) -> list[Reason]:
    """Of all pods that are not ready. events: of the namespace, for what probes said."""
    last: dict[str, str] = {}
    for event in sorted(events, key=_event_time):
        if event.get("reason") == "Unhealthy" and (event.get("involvedObject") or {}).get("kind") == "Pod":
            last[event["involvedObject"].get("name", "")] = _flat(str(event.get("message", "")))
    return [reason for pod in pods for reason in _of_pod(pod, last.get(pod["metadata"]["name"], ""))]


def is_ready(pod: Object) -> bool:
    return condition(pod, "Ready") == "True" and not pod["metadata"].get("deletionTimestamp")


def condition(thing: Object, kind: str) -> str:
    """The status of a condition: True, False, Unknown; "" where there is none."""
    return str((_condition(thing, kind) or {}).get("status", ""))


def explain_scheduling(message: str) -> str:
    """What the scheduler's message means; "" where it means nothing that we know."""
    found = []
    for pattern, meaning in _SCHEDULING:
        if match := re.search(pattern, message):
            found.append(meaning.format(*(group.rstrip(",.") for group in match.groups())))
    return "; ".join(found)


def of_ray_service(service: Object) -> list[Reason]:
    """What KubeRay and Ray Serve report."""
    status = service.get("status") or {}
    found = []
    entry = _condition(service, "Ready")
    if entry is not None and entry["status"] != "True":
        found.append(Reason(title(service), f"{entry.get('reason')}: {_flat(entry.get('message', ''))}"))
    for part in ("activeServiceStatus", "pendingServiceStatus"):
        for name, application in ((status.get(part) or {}).get("applicationStatuses") or {}).items():
            found += _of_application(name, application)
    return found


def of_deployment(deployment: Object) -> list[Reason]:
    found = []
    for kind, bad in (("ReplicaFailure", "True"), ("Progressing", "False")):
        entry = _condition(deployment, kind)
        if entry is not None and entry["status"] == bad:
            text = f"{entry.get('reason')}: {_flat(entry.get('message', ''))}"
            found.append(Reason(title(deployment), text, is_stuck=True))
    return found


def of_controllers(events: Iterable[Object], since: str) -> list[Reason]:
    """Pods and clusters that could not even be made: quota, admission, Pod Security. since: RFC 3339."""
    found: dict[str, Reason] = {}
    for event in events:
        if event.get("reason") in _CONTROLLER_EVENTS and event.get("type") != "Normal" and _event_time(event) >= since:
            about = event.get("involvedObject") or {}
            name = f"{about.get('kind')} {about.get('name')}"
            stuck = event["reason"] != "FailedMount"
            found[name] = Reason(name, f"{event['reason']}: {_flat(str(event.get('message', '')))}", is_stuck=stuck)
    return list(found.values())


def of_job(job: Object) -> list[Reason]:
    entry = _condition(job, "Failed")
    if entry is None or entry["status"] != "True":
        return []
    return [Reason(title(job), f"{entry.get('reason')}: {_flat(entry.get('message', ''))}", is_stuck=True)]


def _of_application(name: str, application: Object) -> list[Reason]:
    if application.get("status") == "RUNNING":
        return []
    failed = application.get("status") in _SERVE_FAILED
    text = f"{application.get('status')} {_flat(application.get('message') or '')}".strip()
    found = [Reason(f"Serve application {name}", text, is_stuck=application.get("status") == "DEPLOY_FAILED")]
    for deployment, state in (application.get("serveDeploymentStatuses") or {}).items():
        if state.get("status") not in ("HEALTHY", None) and (state.get("message") or failed):
            said = f"{state.get('status')} {_flat(state.get('message') or '')}".strip()
            found.append(Reason(f"Serve deployment {name}/{deployment}", said))
    return found


def _of_pod(pod: Object, probe: str) -> Iterator[Reason]:
    name, status = title(pod), pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        yield Reason(name, "is leaving")
        return
    if status.get("phase") == "Succeeded" or is_ready(pod):
        return
    if status.get("phase") == "Failed":
        yield Reason(name, f"failed: {status.get('reason', '')} {_flat(status.get('message', ''))}".strip(), True)
        return
    scheduled = _condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        message = _flat(scheduled.get("message", ""))
        meaning = explain_scheduling(message)
        yield Reason(name, f"FailedScheduling: {message}" + (f" [{meaning}]" if meaning else ""))
        return
    said = False
    inits: Sequence[Object] = status.get("initContainerStatuses") or []
    for is_init, container in [
        *((True, c) for c in inits),
        *((False, c) for c in status.get("containerStatuses") or []),
    ]:
        for reason in _of_container(name, container, is_init):
            said = True
            yield reason
    if not said:
        yield Reason(name, f"runs, and is not ready: {probe}" if probe else f"is not ready ({status.get('phase')})")


def _of_container(pod: str, container: Object, is_init: bool) -> Iterator[Reason]:
    state: dict[str, Any] = container.get("state") or {}
    restarts = int(container.get("restartCount") or 0)
    what = f"container {container['name']}"
    ended = (container.get("lastState") or {}).get("terminated") or state.get("terminated")
    why = ""
    if ended and ended.get("exitCode"):
        cause = "" if ended.get("reason") in (None, "Error") else f" ({ended['reason']})"
        why = f"; it ended with {ended['exitCode']}{cause} {_flat(ended.get('message') or '')}".rstrip()
    if waiting := state.get("waiting"):
        kind = waiting.get("reason", "")
        if kind in ("PodInitializing", "ContainerCreating") and not why:
            return
        stuck = kind in _HOPELESS or kind in _STUCK
        yield Reason(pod, f"{what}: {kind} {_flat(waiting.get('message') or '')}{why}".strip(), stuck)
    elif is_init and "running" in state:
        yield Reason(pod, f"{what} runs" + (f", started {restarts + 1} times{why}" if restarts else ""))
    elif state.get("terminated") and not is_init:
        yield Reason(pod, f"{what} has ended{why}", restarts >= 3)


def _condition(thing: Object, kind: str) -> Object | None:
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((entry for entry in conditions if entry.get("type") == kind), None)


def _event_time(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def _flat(text: str) -> str:
    """One line of at most 300 characters; a trace's last line says most."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > 2 and lines[0].startswith("Traceback"):
        lines = lines[-1:]
    joined = " ".join(lines)
    return joined if len(joined) <= 300 else joined[:297] + "..."
