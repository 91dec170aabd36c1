"""`argosy k8s capacity`: bin-packs a whole spec on the nodes as they are, and says what is missing where."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from k8s.dra import UNCOUNTED
from k8s.objects import PRIORITIES, Object
from k8s.sizing import Sizing
from k8s.spec import ServingSpec
from k8s.tool import exits, upgrade
from k8s.tool.capacity import Cause, Fit, Room, place, read_rooms
from k8s.tool.cluster import Cluster
from k8s.tool.demand import worker_template
from k8s.tool.exits import ToolError
from k8s.tool.quantities import shown
from k8s.tool.tables import say, table


@dataclasses.dataclass(frozen=True, slots=True)
class Fitting:
    """Parts of a spec (head, gateways, replicas, ...) and how many of each fit beside what others run."""

    parts: dict[str, Fit]
    rooms: list[Room]
    gpu_resource: str

    @property
    def exit_code(self) -> int:
        return exits.DONE if all(fit.is_whole for fit in self.parts.values()) else exits.CHANGES


def fit_spec(cluster: Cluster, spec: ServingSpec, things: list[Object], num_replicas: int | None) -> Fitting:
    """As if nothing of this deployment ran yet. num_replicas: of the engine; None = the most that the spec allows.

    Raises ToolError when nodes or pods may not be read, and when no node counts what the spec asks for.
    """
    if spec.has("dra"):
        raise ToolError(f"capacity is not known: {UNCOUNTED}")
    rooms = read_rooms(cluster, priority=PRIORITIES["serving"], is_ours=lambda pod: _is_ours(pod, spec))
    if isinstance(rooms, Cause):
        raise ToolError(f"capacity is not known: {rooms.text}")
    sizing = Sizing(spec)
    service = next(thing for thing in things if thing["kind"] == "RayService")
    config = service["spec"]["rayClusterConfig"]
    gateway = next(thing for thing in things if thing["metadata"]["name"] == f"{spec.name}-gateway" and "template" in
                   thing.get("spec", {}))  # fmt: skip
    units = spec.engine.max_replicas if num_replicas is None else num_replicas
    # GPUs first, since nothing else may stand in their way; the small pods find a place anywhere.
    parts = {
        "engine replicas": place(rooms, worker_template(service), units=units, pods_per_unit=sizing.hosts_per_replica)
    }
    parts["head"] = place(rooms, config["headGroupSpec"]["template"]["spec"], units=1)
    for name, group in upgrade.groups(config).items():
        if name != "workers":
            parts[f"{name} pods"] = place(rooms, group["template"]["spec"], units=group["minReplicas"])
    parts["gateways"] = place(rooms, gateway["spec"]["template"]["spec"], units=spec.gateway.min_replicas)
    return Fitting(parts, rooms, spec.cluster.gpu_resource)


def as_json(found: Fitting) -> dict[str, Any]:
    return {
        "exit_code": found.exit_code,
        "parts": {
            name: {
                "asked": fit.asked,
                "placed": fit.placed,
                "nodes": [list(nodes) for nodes in fit.nodes],
                "lacking": fit.lacking,
            }
            for name, fit in found.parts.items()
        },
        "nodes": {
            room.name: {"free": room.free, "held_by_lower_priorities": room.by_preemption} for room in found.rooms
        },
    }


def print_fitting(found: Fitting, console: Console) -> None:
    for name, fit in found.parts.items():
        say(console, summary(name, fit), "green" if fit.is_whole else "red")
        for node, why in sorted(fit.lacking.items()):
            say(console, f"    node {node} {why}")
    rows = []
    for room in sorted(found.rooms, key=lambda room: room.name):
        free = {name: max(0.0, room.free.get(name, 0.0)) for name in ("cpu", "memory", found.gpu_resource)}
        rows.append((room.name, *(shown(name, amount) for name, amount in free.items())))
    console.print(table("Left on the nodes then", ("node", "CPU", "memory", "GPUs"), rows, num_right=3))


def summary(name: str, fit: Fit) -> str:
    """ "fits 3 of 4 engine replicas"."""
    return f"fits {fit.placed} of {fit.asked} {name}"


def _is_ours(pod: Object, spec: ServingSpec) -> bool:
    labels = pod["metadata"].get("labels") or {}
    in_place = pod["metadata"].get("namespace") == spec.namespace
    return in_place and labels.get("app.kubernetes.io/instance") == spec.name
