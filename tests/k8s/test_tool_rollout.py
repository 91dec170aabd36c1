"""`argosy k8s deploy` where the engine changes: what KubeRay does with it, what is refused, and the ways round it."""

from __future__ import annotations

import pytest

from k8s.spec import ServingSpec
from k8s.tool import commands, deploy, exits
from k8s.tool.specs import find_spec, objects_of
from tests.k8s.api_json import Object
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.manifests import OVERLAYS
from tests.k8s.operators import make_node

__all__ = ["running", "world"]


def test_an_upgrade_without_room_is_refused_before_anything_changes(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    node = world.running.find("Node", "node-1")
    assert node is not None
    node["status"]["allocatable"] = {"cpu": "2", "memory": "8Gi", "pods": "110"}
    world.running.put(node)
    spec = world.spec_file(images={"engine": "argosy-engine:0.2.0"})
    code, text = world.deploy(spec)
    assert code == exits.REFUSED
    assert "1 more replicas must run during the change, and 0 fit: node node-1 lacks" in text
    assert len(world.running.all("Secret")) == 2  # the engine's, and one revision
    code, text = world.run("plan", spec)
    assert code == exits.REFUSED
    assert world.deploy(spec, "--ignore-capacity")[0] == exits.DONE


def test_what_kuberay_would_not_roll_out_is_refused_or_recreated(world: World) -> None:
    first = world.spec_file(engine={"upgrade": "none"})
    assert world.deploy(first)[0] == exits.DONE
    [old] = world.running.all("RayCluster")
    spec = world.spec_file(engine={"upgrade": "none"}, images={"engine": "argosy-engine:0.2.0"})
    code, text = world.deploy(spec)
    assert code == exits.REFUSED
    assert "upgradeStrategy is None" in text

    heal(world)
    code, text = world.deploy(spec, "--recreate")
    assert code == exits.DONE, text
    [new] = world.running.all("RayCluster")
    assert new["metadata"]["name"] != old["metadata"]["name"]


def heal(world: World) -> None:
    """KubeRay makes another cluster for one that was deleted."""

    def remade(server: object, event: str, thing: dict[str, object]) -> None:
        if event == "DELETED" and thing["kind"] == "RayCluster":
            service = world.running.server.find("RayService", "argosy", "argosy")
            assert service is not None
            if service["status"]["activeServiceStatus"]["rayClusterName"] == thing["metadata"]["name"]:  # type: ignore[index]
                world.operators._ray_service(world.running.server, service)

    world.running.state.controllers.append(remade)  # type: ignore[arg-type]


def image_of_cluster(world: World) -> str:
    [cluster] = world.running.all("RayCluster")
    return str(cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"])


def left_behind(world: World) -> str:
    """The spec of a deployment whose RayService somebody changed by hand while its strategy was None."""
    assert world.deploy(world.spec_file(engine={"upgrade": "none"}))[0] == exits.DONE
    [old] = world.running.all("RayCluster")
    new = world.spec_file(engine={"upgrade": "none"}, images={"engine": "argosy-engine:0.2.0"})
    for thing in objects_of(find_spec(new)):
        world.cluster.apply(thing, is_forced=True)
    assert world.running.all("RayCluster")[0]["metadata"]["name"] == old["metadata"]["name"]
    return new


def test_a_cluster_that_was_left_behind_is_no_quiet_success(world: World) -> None:
    """The RayService is as the spec says, and the cluster that runs is not."""
    spec = left_behind(world)
    code, found = world.run_json("plan", spec)
    assert (code, found["upgrade"]["kind"], found["has_changes"]) == (exits.REFUSED, "not rolled out", True)
    assert {thing["action"] for thing in found["objects"]} == {"same"}
    assert world.deploy(spec)[0] == exits.REFUSED
    heal(world)
    code, text = world.deploy(spec, "--recreate")
    assert code == exits.DONE, text
    assert image_of_cluster(world) == "argosy-engine:0.2.0"
    assert world.run("plan", spec)[0] == exits.DONE


def test_another_strategy_rolls_out_what_none_kept_back(world: World) -> None:
    spec = find_spec(left_behind(world))
    changed = world.spec_file(engine={"upgrade": "new-cluster"}, images={"engine": spec.images.engine})
    code, found = world.run_json("plan", changed)
    assert (code, found["upgrade"]["kind"]) == (exits.CHANGES, "new cluster")
    assert found["gpus"]["more_replicas"] == 1
    assert world.deploy(changed)[0] == exits.DONE
    assert image_of_cluster(world) == "argosy-engine:0.2.0"


def test_the_way_back_from_a_recreated_cluster_is_another_one(world: World) -> None:
    heal(world)
    assert world.deploy(world.spec_file(engine={"upgrade": "none"}))[0] == exits.DONE
    world.operators.bad_engine = "0.2.0"
    spec = world.spec_file(engine={"upgrade": "none"}, images={"engine": "argosy-engine:0.2.0"})
    code, text = world.deploy(spec, "--recreate", "--atomic")
    assert code == exits.ROLLED_BACK, text
    assert image_of_cluster(world) == "argosy-engine:0.1.0"


PROD = [name for name in OVERLAYS if name.startswith("prod-")]


@pytest.mark.parametrize("overlay", PROD)
def test_an_image_comes_to_a_production_overlay_by_the_runbook(world: World, overlay: str) -> None:
    """As committed but for its digests: in a maintenance window, and beside the old one where both fit."""
    heal(world)

    def spec(engine: int, **changes: str) -> str:
        images = {name: f"r/{name}@sha256:" + "1" * 64 for name in ("gateway", "loadtest")}
        return world.spec_file(overlay, images={**images, "engine": f"r/engine@sha256:{engine:064d}"}, engine=changes)

    product = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    taints = [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]
    nodes = [make_node(f"gpu-{i}", gpus=8, cpus="192", memory="2Ti", labels=product, taints=taints) for i in range(2)]
    world.running.put(*nodes, *(make_node(f"cpu-{i}") for i in range(3)))
    code, text = world.deploy(spec(1))
    assert code == exits.DONE, text
    workers = [pod for pod in world.running.all("Pod") if "-workers-" in pod["metadata"]["name"]]
    for i, pod in enumerate(workers):
        pod["spec"]["nodeName"] = f"gpu-{i}"
        world.running.put(pod)
    code, found = world.run_json("plan", spec(2))
    if overlay == "prod-scale-to-zero":  # a second cluster starts without a replica
        assert (code, found["upgrade"]["kind"]) == (exits.CHANGES, "new cluster")
        assert world.deploy(spec(2))[0] == exits.DONE
        assert image_of_cluster(world).endswith("2")
        return
    assert (code, found["upgrade"]["kind"]) == (exits.REFUSED, "not rolled out")
    num_pods = len(workers)
    assert any(
        f"`engine.upgrade: new-cluster` would be refused: it needs {16 * num_pods} GPUs" in text
        for text in found["warnings"]
    ), found["warnings"]
    assert world.deploy(spec(2))[0] == exits.REFUSED
    code, text = world.deploy(spec(2, upgrade="new-cluster"))
    assert code == exits.REFUSED
    assert "new cluster: a second, whole cluster" in text
    assert f"GPUs: {8 * num_pods} now, {16 * num_pods} during the change, {8 * num_pods} after it" in text
    assert world.deploy(spec(2), "--recreate")[0] == exits.DONE
    assert image_of_cluster(world).endswith("2")

    more = [make_node(f"gpu-{i}", gpus=8, cpus="192", memory="2Ti", labels=product, taints=taints) for i in range(4, 9)]
    world.running.put(*more)
    _, found = world.run_json("plan", spec(3))
    assert any("`engine.upgrade: new-cluster` would be deployed" in text for text in found["warnings"])
    code, text = world.deploy(spec(3, upgrade="new-cluster"))
    assert code == exits.DONE, text
    assert image_of_cluster(world).endswith("3")
    code, found = world.run_json("plan", spec(3))
    assert found["upgrade"]["kind"] == "in place", "back to the strategy of the overlay"
    assert world.deploy(spec(3))[0] == exits.DONE


def test_what_no_hash_covers_waits_and_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.deploy()[0] == exits.DONE
    [old] = world.running.all("RayCluster")

    def tolerant(spec: ServingSpec) -> list[Object]:
        things = objects_of(spec)
        [service] = [thing for thing in things if thing["kind"] == "RayService"]
        service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["tolerations"] = [{"key": "a"}]
        return things

    monkeypatch.setattr(deploy, "objects_of", tolerant)
    monkeypatch.setattr(commands, "objects_of", tolerant)
    code, found = world.run_json("plan", "dev-cpu")
    assert (code, found["upgrade"]["kind"]) == (exits.CHANGES, "none")
    [warning] = [text for text in found["warnings"] if "KubeRay hands these on to a new cluster only" in text]
    assert "headGroupSpec.template.spec.tolerations" in warning
    heal(world)
    assert world.deploy("dev-cpu", "--recreate")[0] == exits.DONE
    [new] = world.running.all("RayCluster")
    assert new["metadata"]["name"] != old["metadata"]["name"]


def test_a_strategy_that_somebody_else_chose_is_explained(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    things = world.running.snapshot()
    [service] = [thing for thing in things if thing["kind"] == "RayService"]
    options = {"gatewayClassName": "x", "intervalSeconds": 5, "stepSizePercent": 5, "maxSurgePercent": 50}
    service["spec"]["upgradeStrategy"] = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    service["status"]["conditions"] = [{"type": "UpgradeInProgress", "status": "True"}]
    service["status"]["pendingServiceStatus"] = {"rayClusterName": "argosy-00002"}
    world.running.restore(things)
    code, found = world.run_json("plan", "dev-cpu")
    assert (code, found["upgrade"]["kind"]) == (exits.CHANGES, "in place")
    assert "spec.upgradeStrategy.type" in found["upgrade"]["causes"]
    assert any("empties the first cluster while gateways still send to it" in text for text in found["warnings"])
    assert any("an upgrade is under way, and its second cluster argosy-00002" in text for text in found["warnings"])
