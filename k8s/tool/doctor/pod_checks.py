"""Checks of pods and of what serves clients: why pods do not start, restart, or are not reached."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k8s.objects import Object
from k8s.tool import reasons
from k8s.tool.doctor import facts as of
from k8s.tool.doctor.facts import Facts
from k8s.tool.doctor.table import ERROR, WARNING, Table
from k8s.tool.kinds import DEPLOYMENT, EVENT, RAY_SERVICE

TABLE = Table()
MAX_RESTARTS = 3
SLOW_PULL_S = 120.0
_PULLED = re.compile(r'image "([^"]+)" in (?:(\d+)m)?(?:([\d.]+)(m?s))?')


@TABLE.check(
    "pods-pending", ERROR, "`argosy k8s capacity SPEC` says what nodes lack; more nodes, or fewer replicas", "Pod"
)
def pods_pending(facts: Facts) -> Iterator[str]:
    for reason in reasons.of_pods(facts.fleet.pods()):
        if reason.text.startswith("FailedScheduling"):
            yield str(reason)


@TABLE.check("image-pulls", ERROR, "correct the image in the spec, or images.pull_secret", "Pod")
def image_pulls(facts: Facts) -> Iterator[str]:
    for reason in reasons.of_pods(facts.fleet.pods()):
        if re.search(r"ImagePull|ErrImage|InvalidImage", reason.text):
            yield str(reason)


@TABLE.check("slow-pulls", WARNING, "pull images ahead (component balloons), or use a registry near by", EVENT.name)
def slow_pulls(facts: Facts) -> Iterator[str]:
    for event in facts.fleet.items.get(EVENT, []):
        match = _PULLED.search(str(event.get("message", ""))) if event.get("reason") == "Pulled" else None
        if match is None:
            continue
        seconds = 60.0 * int(match.group(2) or 0) + float(match.group(3) or 0) * (
            0.001 if match.group(4) == "ms" else 1
        )
        if seconds > SLOW_PULL_S:
            yield f"{match.group(1)} took {seconds:.0f} s to pull for {event['involvedObject'].get('name')}"


@TABLE.check("containers-start", ERROR, "read the message: a missing Secret, ConfigMap or command", "Pod")
def containers_start(facts: Facts) -> Iterator[str]:
    for reason in reasons.of_pods(facts.fleet.pods()):
        if re.search(r"CreateContainer\w*Error|RunContainerError|CrashLoopBackOff", reason.text):
            yield str(reason)


@TABLE.check(
    "pods-created", ERROR, "read the message: a quota, Pod Security or an admission webhook refuses the pod", EVENT.name
)
def pods_created(facts: Facts) -> Iterator[str]:
    events = [event for event in facts.fleet.items.get(EVENT, []) if _about(event).startswith(facts.spec.name)]
    yield from (str(reason) for reason in reasons.of_controllers(events, "") if reason.is_stuck)


@TABLE.check(
    "oom",
    ERROR,
    "more memory than the spec derives is a bug of the sizing, or a leak: raise the limit and report it",
    "Pod",
)
def out_of_memory(facts: Facts) -> Iterator[str]:
    for pod, status in _containers(facts):
        for state in (status.get("lastState") or {}, status.get("state") or {}):
            if (state.get("terminated") or {}).get("reason") == "OOMKilled":
                yield f"{_name(pod)}: container {status['name']} was killed at its memory limit"
                break


@TABLE.check("restarts", WARNING, "`kubectl logs --previous` of the container", "Pod")
def restarts(facts: Facts) -> Iterator[str]:
    for pod, status in _containers(facts):
        if int(status.get("restartCount") or 0) >= MAX_RESTARTS:
            ended = (status.get("lastState") or {}).get("terminated") or {}
            yield (
                f"{_name(pod)}: container {status['name']} has restarted {status['restartCount']} times, "
                f"last with {ended.get('exitCode', '?')} {ended.get('reason', '')}".rstrip()
            )


@TABLE.check(
    "probes", WARNING, "read the probe's text; liveness must not depend on load or on the model", "Pod", EVENT.name
)
def probes(facts: Facts) -> Iterator[str]:
    for reason in reasons.of_pods(facts.fleet.pods(), facts.fleet.items.get(EVENT, [])):
        if "probe failed" in reason.text:
            yield str(reason)


@TABLE.check("evicted-pods", WARNING, "free the node's disk or memory; `kubectl delete pod` clears the rest", "Pod")
def evicted_pods(facts: Facts) -> Iterator[str]:
    for pod in facts.fleet.pods():
        if (pod.get("status") or {}).get("phase") == "Failed":
            status = pod["status"]
            yield f"{_name(pod)} has failed: {status.get('reason', '')} {status.get('message', '')}".rstrip()


@TABLE.check(
    "stuck-leaving", WARNING, "look at the node; `kubectl delete pod --force` only if the node is gone", "Pod", of.NODES
)
def stuck_leaving(facts: Facts) -> Iterator[str]:
    nodes = {node["metadata"]["name"] for node in facts.lists[of.NODES]}
    for pod in facts.fleet.pods():
        if pod["metadata"].get("deletionTimestamp") and pod["spec"].get("nodeName") not in nodes:
            yield f"{_name(pod)} is leaving a node that is gone: {pod['spec'].get('nodeName')}"


@TABLE.check("service-accounts", WARNING, "automountServiceAccountToken: false, as base has it", "Pod")
def service_account_tokens(facts: Facts) -> Iterator[str]:
    for pod in facts.fleet.gateways + facts.fleet.workers:
        if pod["spec"].get("automountServiceAccountToken", True):
            yield f"{_name(pod)} holds a token of the API server that it does not need"


@TABLE.check("gateway-deployment", ERROR, "`argosy k8s status` says what its pods wait for", DEPLOYMENT.name)
def gateway_deployment(facts: Facts) -> Iterator[str]:
    found = facts.fleet.find(DEPLOYMENT, f"{facts.spec.name}-gateway")
    if found is None:
        yield f"there is no Deployment {facts.spec.name}-gateway"
        return
    yield from (str(reason) for reason in reasons.of_deployment(found))
    available = int((found.get("status") or {}).get("availableReplicas") or 0)
    if available < facts.spec.gateway.min_replicas:
        yield f"{available} of {facts.spec.gateway.min_replicas} gateways are available"


@TABLE.check("gateway-endpoints", ERROR, "no gateway is ready: `argosy k8s status`", of.ENDPOINTS)
def gateway_endpoints(facts: Facts) -> Iterator[str]:
    name = f"{facts.spec.name}-gateway"
    slices = [found for found in facts.lists[of.ENDPOINTS] if _service(found) == name]
    ready = [e for s in slices for e in s.get("endpoints") or [] if (e.get("conditions") or {}).get("ready")]
    if not ready:
        yield f"the Service {name} has no ready endpoint"


@TABLE.check(
    "gateway-spread", WARNING, "more nodes or zones: one that fails would take every gateway with it", "Pod", of.NODES
)
def gateway_spread(facts: Facts) -> Iterator[str]:
    ready = [pod for pod in facts.fleet.gateways if reasons.is_ready(pod)]
    nodes = {node["metadata"]["name"]: node for node in facts.lists[of.NODES]}
    zone = "topology.kubernetes.io/zone"
    for what, key in (("node", "kubernetes.io/hostname"), ("zone", zone)):
        homes = [nodes.get(pod["spec"].get("nodeName"), {"metadata": {}}) for pod in ready]
        places = {(node["metadata"].get("labels") or {}).get(key) for node in homes}
        others = {(node["metadata"].get("labels") or {}).get(key) for node in nodes.values()}
        if len(ready) > 1 and len(places) == 1 and len(others) > 1:
            yield f"all {len(ready)} gateways are in one {what}, {places.pop()}"


@TABLE.check(
    "directory", ERROR, "KubeRay makes it when Serve runs: `argosy k8s status`", RAY_SERVICE.name, of.ENDPOINTS
)
def directory(facts: Facts) -> Iterator[str]:
    name = f"{facts.spec.name}-serve-svc"
    if facts.fleet.service is not None and name not in map(_service, facts.lists[of.ENDPOINTS]):
        yield f"there is no Service {name}, where gateways find the directory of replicas"


def _containers(facts: Facts) -> Iterator[tuple[Object, Object]]:
    for pod in facts.fleet.pods():
        for status in (pod.get("status") or {}).get("containerStatuses") or []:
            yield pod, status


def _about(event: Object) -> str:
    return str((event.get("involvedObject") or {}).get("name", ""))


def _service(endpoint_slice: Object) -> str:
    return str((endpoint_slice["metadata"].get("labels") or {}).get("kubernetes.io/service-name", ""))


def _name(pod: Object) -> str:
    return f"Pod {pod['metadata']['name']}"
