"""Which fields of a RayService cause which upgrade, after the rules of KubeRay's controller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from k8s.amounts import num_bytes_of
from k8s.tool import upgrade
from k8s.tool.specs import find_spec, objects_of
from tests.k8s.api_json import Object


def ray_service(overlay: str = "dev-cpu") -> Object:
    return next(thing for thing in objects_of(find_spec(overlay)) if thing["kind"] == "RayService")


def changed(change: Callable[[Any], object], overlay: str = "dev-cpu") -> upgrade.Upgrade:
    live = ray_service(overlay)
    wanted = copy.deepcopy(live)
    change(wanted["spec"])
    return upgrade.classify(live, wanted)


def set_serve(spec: Any, deployment: str, key: str, value: Any) -> None:
    document = yaml.safe_load(spec["serveConfigV2"])
    for application in document["applications"]:
        for found in application["deployments"]:
            if found["name"] == deployment:
                found[key] = value
    spec["serveConfigV2"] = yaml.safe_dump(document)


def image(spec: Any) -> None:
    spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] = "other:1"


def incremental(spec: Any) -> None:
    spec["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {"maxSurgePercent": 25, "gatewayClassName": "x"},
    }
    image(spec)


def stay(spec: Any) -> None:
    spec["upgradeStrategy"] = {"type": "None"}
    image(spec)


def append_group(spec: Any) -> None:
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    groups.append({**copy.deepcopy(groups[0]), "groupName": "more"})


def prepend_group(spec: Any) -> None:
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    groups.insert(0, {**copy.deepcopy(groups[0]), "groupName": "more"})


def bounds(spec: Any) -> None:
    spec["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas=3, minReplicas=3, maxReplicas=4)


def reserialise(spec: Any) -> None:
    spec["serveConfigV2"] = yaml.safe_dump(yaml.safe_load(spec["serveConfigV2"]), default_flow_style=True)


def quantity(spec: Any) -> None:
    resources = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]
    resources["requests"]["memory"] = str(num_bytes_of(resources["requests"]["memory"]))


@pytest.mark.parametrize(
    ("change", "kind", "cause"),
    [
        (lambda spec: None, upgrade.NONE, ""),
        (reserialise, upgrade.NONE, ""),
        (quantity, upgrade.NONE, ""),
        (image, upgrade.NEW_CLUSTER, "spec.rayClusterConfig.workerGroupSpecs.workers.template.spec.containers"),
        (incremental, upgrade.INCREMENTAL, "spec.rayClusterConfig"),
        (stay, upgrade.NOT_ROLLED_OUT, "spec.rayClusterConfig"),
        (append_group, upgrade.IN_PLACE, "spec.rayClusterConfig.workerGroupSpecs.more"),
        (prepend_group, upgrade.NEW_CLUSTER, "spec.rayClusterConfig.workerGroupSpecs.more"),
        (bounds, upgrade.RESIZE, "spec.rayClusterConfig.workerGroupSpecs.workers.maxReplicas"),
        (lambda spec: set_serve(spec, "Replica", "num_replicas", 5), upgrade.IN_PLACE, "Replica.num_replicas"),
        (lambda spec: spec.update(rayClusterDeletionDelaySeconds=1), upgrade.IN_PLACE, "rayClusterDeletionDelay"),
    ],
)
def test_the_kind_of_upgrade_and_its_cause(change: Callable[[Any], object], kind: str, cause: str) -> None:
    found = changed(change)
    assert found.kind == kind
    assert cause in " ".join(found.causes)


def test_a_first_deployment() -> None:
    assert upgrade.classify(None, ray_service()).kind == upgrade.CREATE


def test_only_heavy_options_restart_replicas() -> None:
    assert changed(lambda spec: set_serve(spec, "Replica", "num_replicas", 5)).restarts == ()
    assert changed(lambda spec: set_serve(spec, "Replica", "max_ongoing_requests", 5)).restarts == ()
    [text] = changed(lambda spec: set_serve(spec, "Replica", "ray_actor_options", {"num_cpus": 9})).restarts
    assert "replicas of Replica in the application model" in text

    def arguments(spec: Any) -> None:
        document = yaml.safe_load(spec["serveConfigV2"])
        document["applications"][1]["args"]["drain_timeout_s"] = 1.0
        spec["serveConfigV2"] = yaml.safe_dump(document)

    assert changed(arguments).restarts == ("replicas of the application model, one after another",)


def test_bounds_reach_a_running_cluster_and_its_autoscaler_keeps_its_number() -> None:
    live = {"spec": copy.deepcopy(ray_service()["spec"]["rayClusterConfig"])}
    wanted = ray_service()
    bounds(wanted["spec"])
    patch = upgrade.resizing(live, wanted, shrinks=False)
    assert {"op": "add", "path": "/spec/workerGroupSpecs/0/replicas", "value": 3} in patch
    assert patch[0]["op"] == "test"
    assert upgrade.resizing(live, wanted, shrinks=True) == []
    wanted["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] = True
    assert "replicas" not in str(upgrade.resizing(live, wanted, shrinks=False)).replace("minReplicas", "").replace(
        "maxReplicas", ""
    )


def test_pods_without_a_replica_go_first() -> None:
    wanted = ray_service()
    live = {"spec": copy.deepcopy(wanted["spec"]["rayClusterConfig"])}
    live["spec"]["workerGroupSpecs"][0].update(replicas=3, minReplicas=3, maxReplicas=4)
    patch = upgrade.resizing(live, wanted, shrinks=True, idle=["w-1", "w-2", "w-3"])
    assert patch[-1]["value"] == {"workersToDelete": ["w-1", "w-2"]}
    assert upgrade.resizing(live, wanted, shrinks=False) == []


@pytest.mark.parametrize("overlay", ["dev-cpu", "prod-h100-tp8"])
def test_numbers_of_replicas_change_in_both_places(overlay: str) -> None:
    service = ray_service(overlay)
    is_fixed = overlay == "dev-cpu"
    found = upgrade.with_replicas(
        service, count=3 if is_fixed else None, low=None if is_fixed else 3, high=None if is_fixed else 6
    )
    replica = upgrade.engine_deployment(yaml.safe_load(found["spec"]["serveConfigV2"]))
    group = upgrade.groups(found["spec"]["rayClusterConfig"])["workers"]
    assert group["minReplicas"] == 3
    if is_fixed:
        assert replica["num_replicas"] == 3 == group["maxReplicas"] == group["replicas"]
    else:
        scaling = replica["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"], group["maxReplicas"]) == (3, 6, 7)
    with pytest.raises(ValueError, match=r"fixed|scaled"):
        upgrade.with_replicas(service, count=None if is_fixed else 1, low=None, high=5 if is_fixed else None)
