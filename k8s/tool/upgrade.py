"""What a changed RayService makes KubeRay do: nothing, an update in place, a second cluster, or nothing it should.

The rules are those of KubeRay 1.7's controller (rayservice_controller.go: shouldPrepareNewCluster,
shouldUpdateCluster, the hash without replicas and workersToDelete), and of Ray Serve for what restarts replicas
(ray/serve/_private/config.py: the update type of each option).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import yaml

from k8s.objects import Object
from k8s.tool.differences import SERVE_CONFIG, Difference, differences

NONE: Final = "none"
CREATE: Final = "create"
IN_PLACE: Final = "in place"
RESIZE: Final = "resize"
INCREMENTAL: Final = "incremental"
NEW_CLUSTER: Final = "new cluster"
NOT_ROLLED_OUT: Final = "not rolled out"

EXPLAINED: Final = {
    NONE: "the engine stays as it is",
    CREATE: "the first Ray cluster is made",
    IN_PLACE: "Ray Serve changes the running cluster",
    RESIZE: "worker groups of the running cluster get other bounds, and no pod restarts",
    INCREMENTAL: "a second cluster grows while the first one shrinks, step by step",
    NEW_CLUSTER: "a second, whole cluster is made beside the first one, and takes over when it is ready",
    NOT_ROLLED_OUT: "upgradeStrategy is None, so KubeRay leaves the running cluster as it is; "
    "`deploy --recreate` deletes it first, and nothing is served until the new one is ready",
}

_SILENT: Final = ("maxReplicas", "minReplicas", "replicas")
_LIGHT: Final = frozenset(
    {
        "autoscaling_config",
        "graceful_shutdown_timeout_s",
        "graceful_shutdown_wait_loop_s",
        "health_check_period_s",
        "health_check_timeout_s",
        "max_ongoing_requests",
        "max_queued_requests",
        "max_surge_percent",
        "num_replicas",
        "user_config",
    }
)
"""Options of a Serve deployment that running replicas take without a restart."""


@dataclasses.dataclass(frozen=True, slots=True)
class Upgrade:
    """What becomes of the engine. causes: the fields that decide it; restarts: what starts anew, in words."""

    kind: str
    causes: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    surge_percent: int = 0

    @property
    def explained(self) -> str:
        return EXPLAINED[self.kind]


def classify(live: Object | None, wanted: Object) -> Upgrade:
    """live, wanted: RayServices; None = there is none yet."""
    if live is None:
        return Upgrade(CREATE)
    changed = differences(live, wanted, is_partial=True)
    cluster = [found for found in changed if found.path[:2] == ("spec", "rayClusterConfig")]
    hashed = [found for found in cluster if not _is_silent(found)]
    serve = [found for found in changed if found.path[:2] == ("spec", SERVE_CONFIG)]
    restarts = _restarts(serve)
    if hashed and not _is_only_appended(live, wanted, hashed):
        return _replaced(wanted, hashed)
    if hashed:
        return Upgrade(IN_PLACE, _fields(hashed) + _fields(serve), ("pods of the added worker groups start", *restarts))
    if serve:
        return Upgrade(IN_PLACE, _fields(serve), restarts)
    if cluster:
        return Upgrade(RESIZE, _fields(cluster))
    others = [found for found in changed if found.path[:1] == ("spec",)]
    return Upgrade(IN_PLACE, _fields(others)) if others else Upgrade(NONE)


def groups(cluster_spec: Object) -> dict[str, Object]:
    """Worker groups of a RayCluster's spec by name."""
    return {group["groupName"]: group for group in cluster_spec.get("workerGroupSpecs") or []}


def resizing(live_cluster: Object, wanted: Object, *, shrinks: bool, idle: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A JSON patch that gives a running RayCluster the bounds of a RayService, which KubeRay hands on only to new
    clusters. `replicas` is left to Ray's autoscaler where that runs; else it is the minimum.

    shrinks: only groups that lose pods, else only the others. idle: pods without a replica, which are named to go
    first. Each group is tested to be where it was read, so that a changed list fails instead of being mistaken.
    """
    config = wanted["spec"]["rayClusterConfig"]
    has_autoscaler = bool(config.get("enableInTreeAutoscaling"))
    asked = groups(config)
    patch: list[dict[str, Any]] = []
    for i, group in enumerate(live_cluster["spec"].get("workerGroupSpecs") or []):
        goal = asked.get(group["groupName"])
        if goal is None:
            continue
        fewer = 0 if has_autoscaler else int(group.get("replicas") or 0) - int(goal.get("replicas") or 0)
        names = ["minReplicas", "maxReplicas"] + ([] if has_autoscaler else ["replicas"])
        changed = [name for name in names if name in goal and group.get(name) != goal[name]]
        if not changed or (fewer > 0) != shrinks:
            continue
        where = f"/spec/workerGroupSpecs/{i}"
        patch.append({"op": "test", "path": f"{where}/groupName", "value": group["groupName"]})
        patch += [{"op": "add", "path": f"{where}/{name}", "value": goal[name]} for name in changed]
        leaving = list(idle)[: fewer * int(group.get("numOfHosts") or 1)]
        if fewer > 0 and leaving:
            patch.append({"op": "add", "path": f"{where}/scaleStrategy", "value": {"workersToDelete": leaving}})
    return patch


def _replaced(wanted: Object, hashed: list[Difference]) -> Upgrade:
    strategy = wanted["spec"].get("upgradeStrategy") or {}
    kind = str(strategy.get("type") or "NewCluster")
    everything = ("every engine pod, in a second cluster; the first one serves until that is ready",)
    if kind == "None":
        return Upgrade(NOT_ROLLED_OUT, _fields(hashed))
    if kind == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions") or {}
        return Upgrade(INCREMENTAL, _fields(hashed), everything, int(options.get("maxSurgePercent", 100)))
    return Upgrade(NEW_CLUSTER, _fields(hashed), everything, 100)


def _is_silent(found: Difference) -> bool:
    """Whether KubeRay's hash leaves the field out."""
    path = found.path[2:]
    if path[:1] == ("upgradeStrategy",):
        return True
    if path[:1] == ("workerGroupSpecs",) and len(path) >= 3:
        return path[2] in _SILENT or path[2:4] == ("scaleStrategy", "workersToDelete")
    return False


def _is_only_appended(live: Object, wanted: Object, hashed: list[Difference]) -> bool:
    """Whether all that differs are worker groups added at the end."""
    old = [group["groupName"] for group in live["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []]
    new = [group["groupName"] for group in wanted["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []]
    added = {("workerGroupSpecs", name) for name in new[len(old) :]}
    return new[: len(old)] == old and bool(added) and all(found.path[2:] in added for found in hashed)


def _restarts(serve: list[Difference]) -> tuple[str, ...]:
    """Applications whose replicas start anew."""
    found: list[str] = []
    for difference in serve:
        path = difference.path[2:]
        if path[:1] != ("applications",) or len(path) < 2:
            text = "Ray Serve's proxies" if path[:1] in (("http_options",), ("proxy_location",)) else ""
        elif path[2:3] == ("deployments",) and len(path) >= 5:
            text = "" if path[4] in _LIGHT else f"replicas of {path[3]} in the application {path[1]}, one after another"
        elif path[2:3] == ("route_prefix",):
            text = ""
        else:
            text = f"replicas of the application {path[1]}, one after another"
        if text and text not in found:
            found.append(text)
    return tuple(found)


def _fields(found: list[Difference]) -> tuple[str, ...]:
    return tuple(difference.field for difference in found)


def with_replicas(service: Object, *, low: int | None, high: int | None, count: int | None) -> Object:
    """A RayService with other numbers of engine replicas, in Serve's config and in the worker group `workers`.

    count: where the number is fixed; low, high: where Serve scales. Raises ValueError for the wrong one of the two.
    """
    changed = copy.deepcopy(service)
    document = yaml.safe_load(changed["spec"][SERVE_CONFIG])
    replica = engine_deployment(document)
    config = changed["spec"]["rayClusterConfig"]
    group = groups(config)["workers"]
    scaling = replica.get("autoscaling_config")
    if scaling is None:
        if count is None:
            raise ValueError("fixed")
        spare = group["maxReplicas"] - replica["num_replicas"]
        replica["num_replicas"] = count
        group.update(minReplicas=count, replicas=count, maxReplicas=count + max(0, spare))
    else:
        if count is not None:
            raise ValueError("scaled")
        spare = group["maxReplicas"] - scaling["max_replicas"]
        scaling["min_replicas"] = scaling["min_replicas"] if low is None else low
        scaling["max_replicas"] = scaling["max_replicas"] if high is None else high
        group.update(minReplicas=scaling["min_replicas"], maxReplicas=scaling["max_replicas"] + max(0, spare))
        if "initial_replicas" in scaling:
            scaling["initial_replicas"] = max(scaling["initial_replicas"], scaling["min_replicas"])
    changed["spec"][SERVE_CONFIG] = yaml.safe_dump(document, sort_keys=False, width=1000)
    return changed


def engine_deployment(document: Any) -> dict[str, Any]:
    """The deployment `Replica` of the application `model` in a Serve config. Raises KeyError."""
    for application in document.get("applications") or []:
        for deployment in application.get("deployments") or []:
            if (application.get("name"), deployment.get("name")) == ("model", "Replica"):
                return deployment  # type: ignore[no-any-return]
    raise KeyError("no deployment Replica in an application model")
