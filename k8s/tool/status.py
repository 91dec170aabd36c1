"""One deployment on one screen: healthy, degraded or down, and why."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from rich.console import Console

from k8s.objects import Object
from k8s.tool import exits, reasons
from k8s.tool.fleet import Fleet, Replica
from k8s.tool.kinds import AUTOSCALER, BUDGET, EVENT, RAY_CLUSTER
from k8s.tool.quantities import pod_requests
from k8s.tool.revisions import Revision
from k8s.tool.tables import say, table

HEALTHY: Final = "healthy"
DEGRADED: Final = "degraded"
DOWN: Final = "down"
CODES: Final = {HEALTHY: exits.DONE, DEGRADED: exits.CHANGES, DOWN: exits.REFUSED}
MAX_EVENTS: Final = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """why: what keeps it from being healthy, worst first."""

    verdict: str
    why: tuple[str, ...]


def health(fleet: Fleet, revisions: list[Revision] | None) -> Health:
    """Down: a client gets no answer. Degraded: it does, and something is not as it was asked for."""
    down: list[str] = []
    bad: list[str] = []
    if "Pod" in fleet.unknown:
        return Health(DEGRADED, (f"pods are not known: {fleet.unknown['Pod']}",))
    if fleet.service is None and "RayService" not in fleet.unknown:
        down.append(f"there is no RayService {fleet.name} in {fleet.namespace}")
    if not any(reasons.is_ready(pod) for pod in fleet.gateways):
        down.append("no gateway is ready")
    if fleet.replicas is not None:
        ready = [replica for replica in fleet.replicas if replica.state == "ready"]
        bounds = fleet.bounds
        if not ready and (bounds is None or bounds[0] > 0):
            down.append("no engine replica is ready")
        elif bounds is not None and len(ready) < bounds[0]:
            bad.append(f"{len(ready)} of {bounds[0]} engine replicas are ready")
        bad += [
            f"replica {replica.id} is {replica.state}"
            for replica in fleet.replicas
            if replica.state not in ("ready", "draining")
        ]
    else:
        bad.append(f"replicas are not known: {fleet.unknown.get('replicas', '')}")
    if fleet.service is not None:
        bad += [str(reason) for reason in reasons.of_ray_service(fleet.service)]
        if reasons.condition(fleet.service, "UpgradeInProgress") == "True":
            bad.append("an upgrade is under way: a second Ray cluster starts")
    bad += [str(reason) for reason in reasons.of_pods(fleet.pods(), fleet.items.get(EVENT, []))]
    if revisions and revisions[0].status not in ("good", ""):
        bad.append(f"the last revision, {revisions[0].number}, is {revisions[0].status}: {revisions[0].note}")
    if down:
        return Health(DOWN, (*down, *bad))
    return Health(DEGRADED if bad else HEALTHY, tuple(bad))


def as_json(fleet: Fleet, revisions: list[Revision] | None) -> dict[str, Any]:
    found = health(fleet, revisions)
    status = (fleet.service or {}).get("status") or {}
    return {
        "name": fleet.name,
        "namespace": fleet.namespace,
        "health": found.verdict,
        "exit_code": CODES[found.verdict],
        "why": list(found.why),
        "conditions": {entry["type"]: entry["status"] for entry in status.get("conditions") or []},
        "clusters": [_cluster(fleet, role, status.get(part) or {}) for role, part in _PARTS if status.get(part)],
        "replicas": None
        if fleet.replicas is None
        else [
            {"id": replica.id, "state": replica.state, "pods": list(replica.pods), **replica.facts}
            for replica in fleet.replicas
        ],
        "bounds": fleet.bounds,
        "workers": [_pod(pod) for pod in fleet.workers],
        "heads": [_pod(pod) for pod in fleet.heads],
        "gateways": [_pod(pod) for pod in fleet.gateways],
        "autoscalers": [_autoscaler(thing) for thing in fleet.items.get(AUTOSCALER, [])],
        "disruption_budgets": {
            thing["metadata"]["name"]: (thing.get("status") or {}).get("disruptionsAllowed")
            for thing in fleet.items.get(BUDGET, [])
        },
        "events": _events(fleet),
        "revisions": None
        if revisions is None
        else [
            {"number": r.number, "status": r.status, "time": r.time, "hash": r.hash, "note": r.note} for r in revisions
        ],
        "unknown": fleet.unknown,
    }


def print_status(fleet: Fleet, revisions: list[Revision] | None, console: Console) -> None:
    document = as_json(fleet, revisions)
    style = {HEALTHY: "bold green", DEGRADED: "bold yellow", DOWN: "bold red"}[document["health"]]
    newest = f", revision {revisions[0].number} ({revisions[0].status})" if revisions else ""
    say(console, f"{fleet.name} in {fleet.namespace}: {document['health']}{newest}", style)
    for text in document["why"]:
        say(console, f"  {text}")
    for entry in document["clusters"]:
        share = "" if entry["traffic_percent"] is None else f", {entry['traffic_percent']} % of the traffic"
        workers = f"{entry['workers_ready']} of {entry['workers_wanted']} workers"
        say(console, f"{entry['role']} cluster {entry['name']}: {entry['state']}, {workers}{share}")
    if fleet.replicas:
        nodes = {pod["metadata"]["name"]: pod for pod in fleet.workers}
        rows = [_row(replica, nodes) for replica in fleet.replicas]
        names = ("replica", "state", "node", "GPUs", "running", "waiting", "KV", "tok/s", "step age")
        console.print(table("Replicas", names, rows, num_right=6))
    rows = [
        (pod["name"], pod["component"], pod["node"] or "-", "yes" if pod["ready"] else "no", str(pod["restarts"]))
        for pod in (*document["heads"], *document["workers"], *document["gateways"])
    ]
    if rows:
        console.print(table("Pods", ("pod", "component", "node", "ready", "restarts"), rows, num_right=1))
    for thing in document["autoscalers"]:
        say(console, f"HPA {thing['name']}: {thing['current']} of {thing['min']} to {thing['max']}; {thing['metrics']}")
    for name, allowed in document["disruption_budgets"].items():
        say(console, f"PodDisruptionBudget {name}: {'not known' if allowed is None else allowed} more may leave now")
    for event in document["events"]:
        say(console, f"{event['time']} {event['object']}: {event['reason']} {event['message']}")
    for kind, why in fleet.unknown.items():
        say(console, f"? {kind}: not known: {why}", "magenta")


_PARTS: Final = (("active", "activeServiceStatus"), ("pending", "pendingServiceStatus"))


def _cluster(fleet: Fleet, role: str, part: Object) -> dict[str, Any]:
    name = part.get("rayClusterName", "")
    live = fleet.find(RAY_CLUSTER, name) or {}
    status = live.get("status") or part.get("rayClusterStatus") or {}
    return {
        "role": role,
        "name": name,
        "state": status.get("state") or "not known",
        "workers_ready": status.get("readyWorkerReplicas", 0),
        "workers_wanted": status.get("desiredWorkerReplicas", 0),
        "traffic_percent": part.get("trafficRoutedPercent"),
        "applications": {n: a.get("status") for n, a in (part.get("applicationStatuses") or {}).items()},
    }


def _pod(pod: Object) -> dict[str, Any]:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    asked = pod_requests(pod["spec"])
    return {
        "name": pod["metadata"]["name"],
        "component": (pod["metadata"].get("labels") or {}).get("app.kubernetes.io/component", ""),
        "node": pod["spec"].get("nodeName"),
        "ready": reasons.is_ready(pod),
        "restarts": sum(int(status.get("restartCount") or 0) for status in statuses),
        # A claim's devices are not in the pod.
        "gpus": None
        if pod["spec"].get("resourceClaims")
        else round(sum(amount for name, amount in asked.items() if name.endswith("/gpu"))),
    }


def _autoscaler(thing: Object) -> dict[str, Any]:
    spec, status = thing["spec"], thing.get("status") or {}
    metrics = []
    for current in status.get("currentMetrics") or []:
        kind = str(current.get("type", "")).lower()
        part = current.get(kind) or {}
        value = (part.get("current") or {}).values()
        name = part.get("name") or (part.get("metric") or {}).get("name", kind)
        metrics.append(f"{name} {' '.join(str(amount) for amount in value)}")
    return {
        "name": thing["metadata"]["name"],
        "min": spec.get("minReplicas", 1),
        "max": spec["maxReplicas"],
        "current": status.get("currentReplicas", 0),
        "wanted": status.get("desiredReplicas", 0),
        "metrics": ", ".join(metrics) or "no metric is known",
    }


def _events(fleet: Fleet) -> list[dict[str, str]]:
    """The last warnings about what is ours, by its name's begin."""
    found = []
    for event in fleet.items.get(EVENT, []):
        about = event.get("involvedObject") or {}
        if event.get("type") == "Normal" or not str(about.get("name", "")).startswith(fleet.name):
            continue
        time = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp", "")
        message = " ".join(str(event.get("message", "")).split())[:200]
        name = f"{about.get('kind')} {about.get('name')}"
        found.append({"time": str(time), "object": name, "reason": str(event.get("reason")), "message": message})
    return sorted(found, key=lambda entry: entry["time"])[-MAX_EVENTS:]


def _row(replica: Replica, pods: dict[str, Object]) -> tuple[str, ...]:
    facts = replica.facts
    known = [pods[name] for name in replica.pods if name in pods]
    used, total = facts.get("blocks_used"), facts.get("blocks_total")
    gpus = [_pod(pod)["gpus"] for pod in known]
    return (
        replica.id,
        replica.state,
        ", ".join(str(pod["spec"].get("nodeName", "-")) for pod in known) or "-",
        _shown(None if None in gpus else sum(gpus)),
        _shown(facts.get("num_running")),
        _shown(facts.get("num_waiting")),
        f"{100 * used / total:.0f} %" if used is not None and total else "-",
        _shown(facts.get("tokens_per_s"), ".0f"),
        _shown(facts.get("step_age_s"), ".2f") + (" s" if facts.get("step_age_s") is not None else ""),
    )


def _shown(value: Any, form: str = "") -> str:
    return "-" if value is None else format(value, form)
