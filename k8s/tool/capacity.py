"""What fits on the nodes as they are now, and what the others lack: the scheduler's filters, said in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

from k8s.objects import Object
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError
from k8s.tool.kinds import NODE, POD
from k8s.tool.quantities import Amounts, amounts, pod_requests, shown

_ENDED: Final = ("Succeeded", "Failed")


@dataclasses.dataclass(slots=True)
class Room:
    """A node and what is free on it."""

    node: Object
    free: Amounts
    by_preemption: Amounts = dataclasses.field(default_factory=dict)  # part of `free` that lower priorities hold

    @property
    def name(self) -> str:
        return str(self.node["metadata"]["name"])

    def take(self, asked: Amounts) -> None:
        for resource, amount in asked.items():
            self.free[resource] = self.free.get(resource, 0.0) - amount


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """How many of the asked units fit. lacking: node -> why no further pod of them does."""

    asked: int
    placed: int
    nodes: tuple[tuple[str, ...], ...]  # of each placed unit, a node per pod
    lacking: dict[str, str]

    @property
    def is_whole(self) -> bool:
        return self.placed >= self.asked


@dataclasses.dataclass(frozen=True, slots=True)
class Cause:
    """Why the nodes are not known."""

    text: str


def read_rooms(cluster: Cluster, *, priority: int, is_ours: Callable[[Object], bool]) -> list[Room] | Cause:
    """All nodes, with what pods of a priority could have: unused, or held by lower priorities.

    is_ours: pods to be counted as if they were not there. Returns a Cause when nodes or other namespaces' pods may
    not be read.
    """
    try:
        nodes = cluster.select(NODE, is_cached=True).items
        pods = cluster.select(POD, is_cached=True).items
    except ApiError as error:
        if error.is_forbidden:
            return Cause("needs list on nodes and on pods of all namespaces")
        raise
    return rooms(nodes, pods, priority=priority, is_ours=is_ours)


def rooms(
    nodes: Sequence[Object], pods: Sequence[Object], *, priority: int, is_ours: Callable[[Object], bool]
) -> list[Room]:
    found = {node["metadata"]["name"]: Room(node, amounts(node["status"].get("allocatable"))) for node in nodes}
    for pod in pods:
        room = found.get(pod["spec"].get("nodeName", ""))
        if room is None or (pod.get("status") or {}).get("phase") in _ENDED or is_ours(pod):
            continue
        asked = pod_requests(pod["spec"])
        if int(pod["spec"].get("priority") or 0) < priority:
            for resource, amount in asked.items():
                room.by_preemption[resource] = room.by_preemption.get(resource, 0.0) + amount
        else:
            room.take(asked)
    return list(found.values())


def place(found: list[Room], template: Object, *, units: int, pods_per_unit: int = 1) -> Fit:
    """Bin-pack `units` of `pods_per_unit` pods each, taking from `found`. A unit is placed whole or not at all.

    template: a pod's spec. First the node with the least room of what is scarcest (GPUs, else CPUs), as a packing
    scheduler would; a unit's pods may share a node.
    """
    asked = pod_requests(template)
    scarce = next((name for name in asked if "/" in name), "cpu")
    placed: list[tuple[str, ...]] = []
    for _ in range(units):
        taken: list[Room] = []
        for _ in range(pods_per_unit):
            fitting = [room for room in found if not why_not(room, template, asked)]
            if not fitting:
                break
            room = min(fitting, key=lambda room: (room.free.get(scarce, 0.0), room.name))
            room.take(asked)
            taken.append(room)
        if len(taken) < pods_per_unit:
            for room in taken:
                room.take({name: -amount for name, amount in asked.items()})
            break
        placed.append(tuple(room.name for room in taken))
    lacking = {room.name: why_not(room, template, asked) or "takes a pod, not a whole replica" for room in found}
    return Fit(units, len(placed), tuple(placed), lacking if len(placed) < units else {})


def why_not(room: Room, template: Object, asked: Amounts) -> str:
    """ "" where a pod fits; else everything that keeps it off, in words."""
    reasons = [*_unfit(room.node, template)]
    for resource, amount in asked.items():
        free = room.free.get(resource, 0.0)
        if amount > free + 1e-9:
            missing = amount - max(0.0, free)
            reasons.append(f"lacks {shown(resource, missing)} of {shown(resource, amount)}")
    return "; ".join(reasons)


def is_ready(node: Object) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _unfit(node: Object, template: Object) -> list[str]:
    spec, labels = node.get("spec") or {}, node["metadata"].get("labels") or {}
    found = []
    if spec.get("unschedulable"):
        found.append("is cordoned")
    elif not is_ready(node):
        found.append("is not ready")
    for taint in spec.get("taints") or []:
        if taint.get("effect") == "PreferNoSchedule" or taint["key"].startswith("node.kubernetes.io/unschedulable"):
            continue
        if not any(tolerates(toleration, taint) for toleration in template.get("tolerations") or []):
            found.append(f"has the taint {taint['key']}={taint.get('value', '')}:{taint.get('effect')}")
    for key, value in (template.get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            found.append(f"has no label {key}={value}" + (f" but {labels[key]}" if key in labels else ""))
    affinity = (template.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms = required.get("nodeSelectorTerms") or []
    if terms and not any(_matches_term(term, labels) for term in terms):
        keys = {expression["key"] for term in terms for expression in term.get("matchExpressions") or []}
        found.append(f"is excluded by node affinity on {', '.join(sorted(keys))}")
    return found


def tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""))


def _matches_term(term: Object, labels: dict[str, str]) -> bool:
    return all(_matches(expression, labels) for expression in term.get("matchExpressions") or [])


def _matches(expression: Object, labels: dict[str, Any]) -> bool:
    key, values, operator = expression["key"], expression.get("values") or [], expression["operator"]
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    if operator == "In":
        return labels.get(key) in values
    if operator == "NotIn":
        return labels.get(key) not in values
    try:
        given, bound = int(labels[key]), int(values[0])
    except (KeyError, ValueError, IndexError):
        return False
    return given > bound if operator == "Gt" else given < bound
