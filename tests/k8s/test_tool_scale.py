"""scale and rollback: who owns a number, what must fit, and the way back without git."""

from __future__ import annotations

import yaml

from k8s.tool import exits, upgrade
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.fleets import start_fleet

__all__ = ["running", "world"]

QUICK = ("--settle", "0", "--patience", "0.2", "--timeout", "10")


def replicas(world: World) -> tuple[int, int]:
    """(of Serve's config, of the running cluster's group)."""
    service = world.running.find("RayService", "argosy")
    assert service is not None
    [cluster] = world.running.all("RayCluster")
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    return upgrade.engine_deployment(document)["num_replicas"], upgrade.groups(cluster["spec"])["workers"]["replicas"]


def test_a_fixed_engine_grows_and_shrinks_in_the_running_cluster(world: World) -> None:
    fleet = start_fleet(world, replicas=2)
    [before] = world.running.all("RayCluster")
    code, text = world.run("scale", "--replicas", "3", *QUICK)
    assert code == exits.DONE, text
    assert replicas(world) == (3, 3)
    assert "engine.min_replicas: 3, engine.max_replicas: 3" in text
    code, text = world.run("scale", "--replicas", "1", *QUICK)
    assert code == exits.DONE, text
    assert replicas(world) == (1, 1)
    [after] = world.running.all("RayCluster")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    del fleet


def test_pods_without_a_replica_are_the_ones_to_go(world: World) -> None:
    fleet = start_fleet(world, replicas=3)
    idle = fleet.pods.pop(1)  # Serve has taken its replica away
    code, text = world.run("scale", "--replicas", "2", *QUICK)
    assert code == exits.DONE, text
    [cluster] = world.running.all("RayCluster")
    assert upgrade.groups(cluster["spec"])["workers"]["scaleStrategy"] == {"workersToDelete": [idle]}


def test_what_serve_scales_is_not_fought_over(world: World) -> None:
    spec = world.spec_file(engine={"min_replicas": 1, "max_replicas": 2}, components=["autoscale-ray"])
    assert world.deploy(spec)[0] == exits.DONE
    code, text = world.run("scale", "--replicas", "2")
    assert code == exits.REFUSED
    assert "Ray Serve decides the number of replicas" in text
    code, text = world.run("scale", "--min", "2", "--max", "3", *QUICK)
    assert code == exits.DONE, text
    service = world.running.find("RayService", "argosy")
    assert service is not None
    scaling = upgrade.engine_deployment(yaml.safe_load(service["spec"]["serveConfigV2"]))["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 3)
    [cluster] = world.running.all("RayCluster")
    group = upgrade.groups(cluster["spec"])["workers"]
    assert (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (2, 4, 1)


def test_a_fixed_engine_has_no_bounds(world: World) -> None:
    start_fleet(world, replicas=1)
    code, text = world.run("scale", "--max", "3")
    assert code == exits.REFUSED
    assert "--replicas sets its number" in text


def test_gateways_are_scaled_where_nobody_else_does(world: World) -> None:
    start_fleet(world, gateways=1)
    code, text = world.run("scale", "--gateways", "3", *QUICK)
    assert code == exits.DONE, text
    assert (world.running.find("Deployment", "argosy-gateway") or {})["spec"]["replicas"] == 3


def test_an_autoscaler_owns_the_gateways(world: World) -> None:
    assert world.deploy(world.spec_file(gateway={"max_replicas": 3}))[0] == exits.DONE
    code, text = world.run("scale", "--gateways", "2")
    assert code == exits.REFUSED
    assert "HorizontalPodAutoscaler decides" in text
    code, text = world.run("scale", "--max-gateways", "5", *QUICK)
    assert code == exits.DONE, text
    assert (world.running.find("HorizontalPodAutoscaler", "argosy-gateway") or {})["spec"]["maxReplicas"] == 5


def test_keda_owns_the_gateways(world: World) -> None:
    start_fleet(world)
    target = {"spec": {"scaleTargetRef": {"name": "argosy-gateway"}}}
    metadata = {"name": "s", "namespace": "argosy"}
    world.running.put({"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": metadata, **target})
    code, text = world.run("scale", "--gateways", "2")
    assert code == exits.REFUSED
    assert "the ScaledObject s of KEDA, which is not ours," in text


def test_a_scaled_object_of_ours_owns_the_gateways_and_takes_bounds(world: World) -> None:
    spec = world.spec_file(gateway={"max_replicas": 3}, components=["autoscale-keda"])
    assert world.deploy(spec)[0] == exits.DONE
    before = (world.running.find("Deployment", "argosy-gateway") or {})["spec"]
    code, text = world.run("scale", "--gateways", "2")
    assert code == exits.REFUSED
    assert "--gateways: the ScaledObject argosy-gateway of KEDA decides the number of gateways" in text
    code, text = world.run("scale", "--min-gateways", "2", "--max-gateways", "5", *QUICK)
    assert code == exits.DONE, text
    assert "gateway.min_replicas: 2, gateway.max_replicas: 5" in text
    scaled = (world.running.find("ScaledObject", "argosy-gateway") or {})["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"], scaled["fallback"]["replicas"]) == (2, 5, 5)
    assert (world.running.find("Deployment", "argosy-gateway") or {})["spec"] == before
    code, text = world.run("scale", "--min-gateways", "9", *QUICK)
    assert code == exits.ERROR
    assert "gateway.min_replicas: 9 is above max_replicas 5" in text


def test_what_does_not_fit_is_refused(world: World) -> None:
    start_fleet(world, replicas=1)
    code, text = world.run("scale", "--replicas", "60")
    assert code == exits.REFUSED
    assert "59 more replicas must run during the change" in text
    assert replicas(world) == (1, 1)
    code, text = world.run("scale", "--replicas", "900")
    assert code == exits.ERROR
    assert "outside 0 to 64" in text


def test_a_quota_is_kept(world: World) -> None:
    start_fleet(world, replicas=1)
    metadata = {"name": "team", "namespace": "argosy"}
    spec = {"hard": {"pods": "10"}}
    status = {"used": {"pods": "9"}}
    world.running.put(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": spec, "status": status}
    )
    code, text = world.run("scale", "--replicas", "3")
    assert code == exits.REFUSED
    assert "ResourceQuota team: 2 pods more are needed of pods 10, of which 1 pod are left" in text


def test_the_way_back_needs_only_the_cluster(world: World) -> None:
    first = world.spec_file(gateway={"queue_timeout_s": 11})
    second = world.spec_file(gateway={"queue_timeout_s": 22})
    assert world.deploy(first)[0] == world.deploy(second)[0] == exits.DONE
    code, text = world.run("rollback", *QUICK)
    assert code == exits.ERROR
    assert "--yes is needed" in text
    assert "~ change Deployment argosy-gateway" in text
    code, text = world.run("rollback", "--yes", *QUICK)
    assert code == exits.DONE, text
    assert world.run("plan", first)[0] == exits.DONE
    assert world.run("plan", second)[0] == exits.CHANGES
    code, found = world.run_json("rollback", "--list")
    assert [(entry["number"], entry["status"], entry["note"]) for entry in found["revisions"]] == [
        (3, "good", "rollback to revision 1"),
        (2, "good", ""),
        (1, "good", ""),
    ]
    assert world.run("rollback", "--to", "2", "--yes", *QUICK)[0] == exits.DONE
    assert world.run("plan", second)[0] == exits.DONE
    code, text = world.run("rollback", "--to", "99", "--yes")
    assert code == exits.ERROR
    assert "there is no revision 99; kept are 4 (good), 3 (good)" in text


def test_a_failed_deployment_is_left_behind(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    world.operators.application = "DEPLOY_FAILED"
    bad = world.spec_file(engine={"max_num_seqs": 8})
    assert world.deploy(bad)[0] == exits.UNFINISHED
    world.operators.application = "RUNNING"
    code, text = world.run("rollback", "--yes", *QUICK)
    assert code == exits.DONE, text
    assert world.run("plan", "dev-cpu")[0] == exits.DONE


def test_nothing_to_return_to(world: World) -> None:
    assert world.run("rollback", "--yes")[0] == exits.ERROR
    assert world.run("scale", "--replicas", "2")[0] == exits.ERROR
    assert world.deploy()[0] == exits.DONE
    code, text = world.run("rollback", "--yes")
    assert code == exits.ERROR
    assert "no good revision before 1" in text
