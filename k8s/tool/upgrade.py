"""What a changed RayService makes KubeRay do: nothing, an update in place, a second cluster, or nothing it should.

KubeRay compares `rayClusterConfig` by a hash of its JSON with the annotation of the cluster that it would replace: the
pending one, else the active one. Read in ray-project/kuberay, ray-operator/controllers/ray/rayservice_controller.go at
commit 0110627, which is older than 1.7.0 (no copy of that was at hand); of the hash's newest form, in utils/util.go,
only what pull request 4751 quotes:

- shouldPrepareNewCluster, shouldUpdateCluster, isClusterSpecHashEqual, reconcileServe. The hash leaves out `replicas`,
  `minReplicas`, `maxReplicas` and `scaleStrategy` (whose one field is `workersToDelete`) of a worker group, the
  cluster's own `upgradeStrategy` and, since pull request 4569, `tolerations` and `schedulingGates` of every pod
  template. All else is in it: `suspend`, `idleTimeoutSeconds`, `numOfHosts`, the
  autoscaler's options, the order of lists, a field that is gone. Groups added at the end come to the running cluster.
- The service's own `upgradeStrategy` is in no hash: turning it from None to NewCluster rolls out what waits by then.
- With None a changed cluster stays as it is, and Serve's config still reaches it.
- modifyRayCluster: groups added at the end, and a new version of KubeRay, write the whole config into the active
  cluster, bounds included; pods that run stay.

A cluster edited by hand keeps its annotation; here it counts as what it is. What restarts replicas is Ray Serve's
(ray/serve/_private/config.py: the update type of each option).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import yaml

from k8s.objects import Object
from k8s.tool.differences import ABSENT, SERVE_CONFIG, Difference, Path, differences

NONE: Final = "none"
CREATE: Final = "create"
IN_PLACE: Final = "in place"
RESIZE: Final = "resize"
INCREMENTAL: Final = "incremental"
NEW_CLUSTER: Final = "new cluster"
NOT_ROLLED_OUT: Final = "not rolled out"

INCREMENTAL_STRATEGY: Final = "NewClusterWithIncrementalUpgrade"

EXPLAINED: Final = {
    NONE: "the engine stays as it is",
    CREATE: "the first Ray cluster is made",
    IN_PLACE: "the running cluster stays, and Ray Serve or KubeRay takes the new settings",
    RESIZE: "worker groups of the running cluster get other bounds, and no pod restarts",
    INCREMENTAL: "a second cluster grows while the first one shrinks, step by step",
    NEW_CLUSTER: "a second, whole cluster is made beside the first one, and takes over when it is ready",
    NOT_ROLLED_OUT: "upgradeStrategy is None, so KubeRay leaves the running cluster as it is; "
    "`deploy --recreate` deletes it first, and nothing new is served until its successor is ready; "
    "`engine.upgrade: new-cluster` in the spec makes a second one beside it, where both fit",
}

_CLUSTER: Final = ("spec", "rayClusterConfig")
_BOUNDS: Final = {("maxReplicas",), ("minReplicas",), ("replicas",)}
_UNHASHED: Final = {("template", "spec", "tolerations"), ("template", "spec", "schedulingGates")}
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
    """What becomes of the engine. causes: the fields that decide it; restarts: what starts anew, in words; left: fields
    that KubeRay hands on to a new cluster only, and that are in no hash."""

    kind: str
    causes: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    surge_percent: int = 0
    left: tuple[str, ...] = ()

    @property
    def explained(self) -> str:
        return EXPLAINED[self.kind]

    @property
    def is_left_behind(self) -> bool:
        """Whether the running cluster will not be as asked, unless it is deleted."""
        return self.kind == NOT_ROLLED_OUT or bool(self.left)


def classify(
    live: Object | None, wanted: Object, *, changed: Sequence[Difference] | None = None, running: Object | None = None
) -> Upgrade:
    """live, wanted: RayServices; None = there is none yet. changed: how they differ, fields that go included; None =
    find out, without those. running: the RayCluster that KubeRay compares with, as far as it may be read."""
    if live is None:
        return Upgrade(CREATE)
    found = differences(live, wanted, is_partial=True) if changed is None else list(changed)
    of_cluster = [each for each in found if each.path[:2] == _CLUSTER]
    hashed = [each for each in of_cluster if not _is_silent(each)]
    config = live["spec"]["rayClusterConfig"]
    if running is not None:
        hashed, config = _behind(running, wanted, hashed), running["spec"]
    if hashed and not _is_only_appended(config, wanted, hashed):
        return _replaced(wanted, hashed)
    serve = [each for each in found if each.path[:2] == ("spec", SERVE_CONFIG)]
    bounds = [each for each in of_cluster if each.path[2:3] == ("workerGroupSpecs",) and each.path[4:5] in _BOUNDS]
    left = _fields([each for each in of_cluster if _is_unhashed(each)])
    others = [each for each in found if each.path[:1] == ("spec",) and each.path[:2] != _CLUSTER]
    if hashed or serve:
        added = ("pods of the added worker groups start",) if hashed else ()
        return Upgrade(IN_PLACE, _fields(hashed) + _fields(serve), (*added, *_restarts(serve)), left=left)
    if bounds:
        return Upgrade(RESIZE, _fields(bounds), left=left)
    return Upgrade(IN_PLACE if others else NONE, _fields(others), left=left)


def compared_cluster(service: Object | None) -> str:
    """Name of the RayCluster that KubeRay compares a RayService with: pending, else active; "" = none."""
    status = (service or {}).get("status") or {}
    for key in ("pendingServiceStatus", "activeServiceStatus"):
        if name := (status.get(key) or {}).get("rayClusterName"):
            return str(name)
    return ""


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


def strategy(service: Object) -> str:
    """Of a RayService; without one KubeRay takes NewCluster, unless its own ENABLE_ZERO_DOWNTIME is false."""
    return str((service["spec"].get("upgradeStrategy") or {}).get("type") or "NewCluster")


def _replaced(wanted: Object, hashed: list[Difference]) -> Upgrade:
    kind = strategy(wanted)
    everything = ("every engine pod, in a second cluster; the first one serves until that is ready",)
    if kind == "None":
        return Upgrade(NOT_ROLLED_OUT, _fields(hashed))
    if kind == INCREMENTAL_STRATEGY:
        options = wanted["spec"]["upgradeStrategy"].get("clusterUpgradeOptions") or {}
        return Upgrade(INCREMENTAL, _fields(hashed), everything, int(options.get("maxSurgePercent", 100)))
    return Upgrade(NEW_CLUSTER, _fields(hashed), everything, 100)


def _behind(running: Object, wanted: Object, hashed: Sequence[Difference]) -> list[Difference]:
    """What a running cluster lacks of the wanted config. hashed: what changes, for fields that go: of those, the ones
    that the cluster still has."""
    config = {"spec": {"rayClusterConfig": running["spec"]}}
    goal = {"spec": {"rayClusterConfig": wanted["spec"]["rayClusterConfig"]}}
    found = [each for each in differences(config, goal, is_partial=True) if not _is_silent(each)]
    whole = differences(goal, config, is_partial=False)
    present = {each.path for each in whole if each.before == ABSENT}
    gone = [each for each in hashed if each.after == ABSENT and any(_covers(path, each.path) for path in present)]
    return found + gone


def _covers(path: Path, other: Path) -> bool:
    return other[: len(path)] == path or path[: len(other)] == other


def _is_silent(found: Difference) -> bool:
    """Whether KubeRay's hash leaves the field out."""
    path = found.path[2:]
    if path[:1] == ("upgradeStrategy",):
        return True
    if path[:1] == ("workerGroupSpecs",) and (path[2:3] in _BOUNDS or path[2:3] == ("scaleStrategy",)):
        return True
    return _is_unhashed(found)


def _is_unhashed(found: Difference) -> bool:
    """Of a pod's template, and in no hash."""
    path = found.path[2:]
    if path[:1] == ("headGroupSpec",):
        return path[1:4] in _UNHASHED
    return path[:1] == ("workerGroupSpecs",) and path[2:5] in _UNHASHED


def _is_only_appended(config: Object, wanted: Object, hashed: list[Difference]) -> bool:
    """Whether all that differs are worker groups added at the end. config: of the cluster, as it is."""
    old = [group["groupName"] for group in config.get("workerGroupSpecs") or []]
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
