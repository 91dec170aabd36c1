"""Which fields of a RayService cause which upgrade, after the rules of KubeRay's controller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from k8s.amounts import num_bytes_of
from k8s.tool import upgrade
from k8s.tool.differences import differences
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


def memory(spec: Any, shown: Callable[[int], str]) -> None:
    resources = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]
    resources["requests"]["memory"] = shown(num_bytes_of(resources["requests"]["memory"]))


def worker(spec: Any) -> Any:
    return spec["rayClusterConfig"]["workerGroupSpecs"][0]


def pod_spec(spec: Any) -> Any:
    return worker(spec)["template"]["spec"]


def tolerate(spec: Any) -> None:
    for part in (spec["rayClusterConfig"]["headGroupSpec"], worker(spec)):
        part["template"]["spec"]["tolerations"] = [{"key": "more", "operator": "Exists"}]


def reorder(spec: Any) -> None:
    pod_spec(spec)["volumes"].reverse()


def remove_group(spec: Any) -> None:
    spec["rayClusterConfig"]["workerGroupSpecs"].pop()


def remove_argument(spec: Any) -> None:
    document = yaml.safe_load(spec["serveConfigV2"])
    del document["applications"][1]["args"]["drain_timeout_s"]
    spec["serveConfigV2"] = yaml.safe_dump(document)


@pytest.mark.parametrize(
    ("change", "kind", "cause"),
    [
        (lambda spec: None, upgrade.NONE, ""),
        (reserialise, upgrade.NONE, ""),
        (lambda spec: memory(spec, lambda size: f"{size >> 10}Ki"), upgrade.NONE, ""),
        (lambda spec: memory(spec, str), upgrade.NEW_CLUSTER, "resources.requests.memory"),
        (reorder, upgrade.NEW_CLUSTER, "volumes.order"),
        (remove_argument, upgrade.IN_PLACE, "args.drain_timeout_s"),
        (lambda spec: worker(spec).update(suspend=True), upgrade.NEW_CLUSTER, "workers.suspend"),
        (lambda spec: worker(spec).update(idleTimeoutSeconds=5), upgrade.NEW_CLUSTER, "idleTimeoutSeconds"),
        (lambda spec: worker(spec).update(numOfHosts=2), upgrade.NEW_CLUSTER, "numOfHosts"),
        (lambda spec: worker(spec).update(scaleStrategy={"workersToDelete": ["a"]}), upgrade.NONE, ""),
        (
            lambda spec: spec["rayClusterConfig"].update(autoscalerOptions={"version": "v2"}),
            upgrade.NEW_CLUSTER,
            "autoscalerOptions",
        ),
        (lambda spec: spec["rayClusterConfig"].update(upgradeStrategy={"type": "None"}), upgrade.NONE, ""),
        (lambda spec: spec.update(upgradeStrategy={"type": "None"}), upgrade.IN_PLACE, "spec.upgradeStrategy.type"),
        (tolerate, upgrade.NONE, ""),
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


def test_a_field_that_goes_is_in_the_hash_and_may_be_seen_in_the_changes_only() -> None:
    live, wanted = ray_service("prod-scale-to-zero"), ray_service("prod-scale-to-zero")
    for service in (live, wanted):
        service["spec"]["upgradeStrategy"] = {"type": "NewCluster"}
    remove_group(wanted["spec"])
    assert upgrade.classify(live, wanted).kind == upgrade.NONE
    changed = differences(live, wanted, is_partial=False)
    found = upgrade.classify(live, wanted, changed=changed)
    assert (found.kind, found.causes) == (upgrade.NEW_CLUSTER, ("spec.rayClusterConfig.workerGroupSpecs.directory",))
    running = {"spec": copy.deepcopy(live["spec"]["rayClusterConfig"])}
    assert upgrade.classify(live, wanted, changed=changed, running=running).kind == upgrade.NEW_CLUSTER
    running["spec"]["workerGroupSpecs"].pop()
    assert upgrade.classify(live, wanted, changed=changed, running=running).kind != upgrade.NEW_CLUSTER


def test_tolerations_and_gates_are_in_no_hash_and_wait_for_another_cluster() -> None:
    found = changed(tolerate)
    assert not found.restarts
    assert [field.rpartition(".")[2] for field in found.left] == ["tolerations", "tolerations"]
    assert found.is_left_behind
    gated = changed(lambda spec: pod_spec(spec).update(schedulingGates=[{"name": "g"}]))
    assert (gated.kind, len(gated.left)) == (upgrade.NONE, 1)

    def both(spec: Any) -> None:
        tolerate(spec)
        image(spec)

    assert (changed(both).kind, changed(both).left) == (upgrade.NEW_CLUSTER, ())


def test_what_the_hash_is_compared_with_is_the_cluster_and_not_the_service() -> None:
    """A change that None kept back is rolled out by whatever strategy comes next, and undone without a new cluster."""
    old, new = ray_service(), ray_service()
    image(new["spec"])
    running = {"spec": copy.deepcopy(old["spec"]["rayClusterConfig"])}
    assert upgrade.classify(new, new).kind == upgrade.NONE
    assert upgrade.classify(new, new, running=running).kind == upgrade.NEW_CLUSTER
    for service in (old, new):
        service["spec"]["upgradeStrategy"] = {"type": "None"}
    assert upgrade.classify(new, new, running=running).kind == upgrade.NOT_ROLLED_OUT
    assert upgrade.classify(new, old, running=running).kind == upgrade.NONE
    running["spec"]["workerGroupSpecs"][0].update(replicas=7, scaleStrategy={"workersToDelete": ["a"]})  # an autoscaler
    assert upgrade.classify(old, old, running=running).kind == upgrade.NONE


def test_the_pending_cluster_is_compared_while_there_is_one() -> None:
    status = {"activeServiceStatus": {"rayClusterName": "a"}}
    assert upgrade.compared_cluster({"status": status}) == "a"
    assert upgrade.compared_cluster({"status": {**status, "pendingServiceStatus": {"rayClusterName": "b"}}}) == "b"
    assert upgrade.compared_cluster({"status": {**status, "pendingServiceStatus": {}}}) == "a"
    assert upgrade.compared_cluster(None) == ""


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
