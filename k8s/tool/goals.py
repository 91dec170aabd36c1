"""When a deployed object is where it should be, and how far it is until then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from k8s.objects import Object
from k8s.tool import reasons
from k8s.tool.kinds import DEPLOYMENT, EVENT, JOB, POD, RAY_SERVICE, Kind, kind_of
from k8s.tool.mirror import Mirror
from k8s.tool.reasons import Reason
from k8s.tool.waves import REST, wave_of

WATCHED: tuple[Kind, ...] = (RAY_SERVICE, DEPLOYMENT, JOB, POD, EVENT)


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """Where one object is. text: for its line of the progress display."""

    is_done: bool
    text: str
    reasons: tuple[Reason, ...] = ()


Judge = Callable[[Object], Standing]


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """One object that a wave waits for."""

    kind: Kind
    name: str

    @property
    def title(self) -> str:
        return f"{self.kind.name} {self.name}"

    def look(self, mirror: Mirror) -> Standing:
        if error := mirror.error(self.kind):
            return Standing(False, f"not known: {error}")
        thing = mirror.find(self.kind, self.name)
        if thing is None:
            return Standing(False, "is not there (any more)")
        return _JUDGES[self.kind](thing)


def goals_of(things: Sequence[Object]) -> list[Goal]:
    """Of what a wave applied; a suspended Job is nobody's goal."""
    found = []
    for thing in things:
        kind = kind_of(thing)
        if kind in _JUDGES and wave_of(thing) != REST and not (thing.get("spec") or {}).get("suspend"):
            found.append(Goal(kind, thing["metadata"]["name"]))
    return found


def ray_service(service: Object) -> Standing:
    """Ready at this generation, no upgrade under way, every application of the active cluster running."""
    status = service.get("status") or {}
    why = tuple(reasons.of_ray_service(service))
    if int(status.get("observedGeneration") or 0) < int(service["metadata"].get("generation") or 0):
        return Standing(False, "KubeRay has not looked at it yet", why)
    if reasons.condition(service, "UpgradeInProgress") == "True":
        pending = status.get("pendingServiceStatus") or {}
        share = pending.get("trafficRoutedPercent")
        part = f", {share} % of the traffic" if share is not None else ""
        return Standing(False, f"the second cluster {pending.get('rayClusterName', '')} starts{part}", why)
    applications = (status.get("activeServiceStatus") or {}).get("applicationStatuses") or {}
    late = [f"{name} {state.get('status')}" for name, state in applications.items() if state.get("status") != "RUNNING"]
    if not applications:
        return Standing(False, "no Serve application yet", why)
    if late:
        return Standing(False, ", ".join(sorted(late)), why)
    if reasons.condition(service, "Ready") != "True":
        return Standing(False, "its applications run, and it is not Ready", why)
    return Standing(True, "ready")


def deployment(thing: Object) -> Standing:
    spec, status = thing["spec"], thing.get("status") or {}
    wanted = int(spec.get("replicas", 1))
    updated, available = int(status.get("updatedReplicas") or 0), int(status.get("availableReplicas") or 0)
    old = int(status.get("replicas") or 0) - updated
    why = tuple(reasons.of_deployment(thing))
    if int(status.get("observedGeneration") or 0) < int(thing["metadata"].get("generation") or 0):
        return Standing(False, "has not been looked at yet", why)
    if updated < wanted or available < wanted or old > 0:
        leaving = f", {old} old to leave" if old > 0 else ""
        return Standing(False, f"{updated} of {wanted} new, {available} available{leaving}", why)
    return Standing(True, f"{available} available")


def job(thing: Object) -> Standing:
    why = tuple(reasons.of_job(thing))
    if reasons.condition(thing, "Complete") == "True":
        return Standing(True, "complete")
    status = thing.get("status") or {}
    return Standing(False, f"{status.get('active') or 0} running, {status.get('failed') or 0} failed", why)


_JUDGES: dict[Kind, Judge] = {RAY_SERVICE: ray_service, DEPLOYMENT: deployment, JOB: job}


def why_not(mirror: Mirror, goal: Goal, instance: str, since: str) -> list[Reason]:
    """Everything that explains why a goal is not reached: the object's own words, its pods', its controllers'."""
    standing = goal.look(mirror)
    pods = [pod for pod in mirror.items(POD) if _belongs(pod, goal, instance)]
    found = list(standing.reasons) + reasons.of_pods(pods, mirror.items(EVENT))
    return found + reasons.of_controllers(mirror.items(EVENT), since)


def _belongs(pod: Object, goal: Goal, instance: str) -> bool:
    labels = pod["metadata"].get("labels") or {}
    if labels.get("app.kubernetes.io/instance") != instance:
        return False
    component = labels.get("app.kubernetes.io/component", "")
    if goal.kind is RAY_SERVICE:
        return str(component).startswith("engine-")
    if goal.kind is JOB:
        return bool(labels.get("job-name", labels.get("batch.kubernetes.io/job-name")) == goal.name)
    return bool(component == "gateway")
