"""Each check of the doctor is silent on a healthy cluster and speaks on its own fault; missing rights are no fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s.spec import NO_DIGEST
from k8s.tool import exits
from k8s.tool.diagnosis import CHECKS
from k8s.tool.doctor.facts import read_facts
from k8s.tool.doctor.table import OK, UNKNOWN, examine
from k8s.tool.specs import find_spec
from tests.k8s.api_thread import Running
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.faults_of_clusters import BREAKS, surroundings
from tests.k8s.fleets import start_fleet

__all__ = ["running", "world"]

DIGEST = "sha256:" + "1" * 64


def healthy_spec(world: World) -> str:
    """Something of everything: a GPU, an autoscaler, volumes, a registry, monitoring. Its pods are stand-ins."""
    return world.spec_file(
        "single-gpu",
        environment="prod",
        components=["gcs-rocksdb"],
        engine={"min_replicas": 1, "max_replicas": 1},
        gateway={"min_replicas": 2, "max_replicas": 4},
        cluster={"has_prometheus_operator": True, "has_pod_metrics": True},
        images={
            "gateway": f"example/gateway@{DIGEST}",
            "engine": f"example/engine@{DIGEST}",
            "pull_secret": "registry",
        },
    )


class Healthy:
    """A healthy deployment, made once: each test breaks it and mends it again."""

    def __init__(self, world: World) -> None:
        world.running.put(*surroundings())
        self.path = healthy_spec(world)
        self.world = world
        self.fleet = start_fleet(world, spec=self.path)
        deployment = world.running.find("Deployment", "argosy-gateway")
        assert deployment is not None
        deployment["spec"]["replicas"] = 2  # as its autoscaler does
        world.running.put(deployment)
        for i in range(2):
            pod = world.running.find("Pod", f"argosy-gateway-{i}")
            assert pod is not None
            pod["spec"]["nodeName"] = f"node-{i + 1}"
            world.running.put(pod)


@pytest.fixture
def healthy(world: World) -> Iterator[Healthy]:
    yield Healthy(world)


def outcomes(healthy: Healthy, path: str = "") -> dict[str, tuple[str, tuple[str, ...]]]:
    facts = read_facts(healthy.world.cluster, find_spec(path or healthy.path))
    return {result.check.name: (result.outcome, result.texts) for result in examine(CHECKS, facts)}


def test_every_check_has_a_fault_and_a_fix() -> None:
    assert {check.name for check in CHECKS} == set(BREAKS)
    assert all(len(check.fix) > 10 for check in CHECKS)
    assert len(CHECKS) >= 40


def test_a_healthy_cluster_is_silent(healthy: Healthy) -> None:
    assert {name: found for name, found in outcomes(healthy).items() if found[0] != OK} == {}
    code, text = healthy.world.run("doctor", healthy.path)
    assert code == exits.DONE, text


def test_each_check_speaks_on_its_fault(tmp_path: Path) -> None:
    """One API server for all, whose objects are put back after every fault."""
    server = Running(tmp_path)
    from k8s.tool.cluster import connect
    from tests.k8s.operators import Operators, make_node

    operators = Operators()
    server.state.controllers.append(operators)
    server.put(make_node("node-1"))
    made = World(server, connect(server.kubeconfig, None, 5.0), operators, tmp_path)
    healthy = Healthy(made)
    server.state.controllers.clear()
    before = server.snapshot()
    silent = []
    for check in CHECKS:
        path = healthy.path
        if check.name == "placeholder-images":
            path = made.spec_file(
                "single-gpu", environment="prod", gateway={"min_replicas": 2, "max_replicas": 2},
                images={"gateway": f"e/g@{NO_DIGEST}", "engine": f"e/e@{NO_DIGEST}"},
            )  # fmt: skip
        if check.name == "image-digests":
            for pod in server.all("Pod"):
                if pod["metadata"]["name"] == "argosy-gateway-0":
                    pod["spec"]["containers"][0]["image"] = "example/gateway:latest"
                    server.put(pod)
        breaker = Breaker(made, healthy)
        BREAKS[check.name](breaker)  # type: ignore[arg-type]
        outcome, texts = outcomes(healthy, path)[check.name]
        if outcome != check.severity or not texts:
            silent.append((check.name, outcome, texts))
        server.restore(before)
        healthy.fleet.states.clear()
        server.state.version = "v1.36.2"
        server.state.pages["*/proxy/progressz"] = healthy.fleet.progress
        server.state.on_exec = healthy.fleet.execute
    made.cluster.close()
    server.close()
    assert silent == []


class Breaker:
    """A world that knows its fleet."""

    def __init__(self, world: World, healthy: Healthy) -> None:
        self.running, self.cluster, self.fleet = world.running, world.cluster, healthy.fleet


def test_without_rights_a_check_is_not_known_and_says_what_it_needs(healthy: Healthy) -> None:
    healthy.world.running.fault("GET /api*", status=403, message="forbidden")
    found = outcomes(healthy)
    assert {outcome for outcome, _ in found.values()} <= {OK, UNKNOWN}
    assert found["nodes-ready"] == (UNKNOWN, ("needs list on nodes",))
    assert found["engine-secret"] == (UNKNOWN, ("needs get on secrets",))
    code, text = healthy.world.run("doctor", healthy.path)
    assert code == exits.DONE
    assert "needs list on nodes" in text


def test_it_only_reads(healthy: Healthy) -> None:
    healthy.world.running.state.calls.clear()
    healthy.world.run("doctor", healthy.path)
    assert {call.split()[0] for call in healthy.world.running.state.calls} == {"GET"}


def test_findings_have_a_fix_and_the_exit_code_is_the_worst(healthy: Healthy) -> None:
    BREAKS["node-pressure"](healthy.world)
    code, found = healthy.world.run_json("doctor", healthy.path)
    assert code == exits.CHANGES == found["exit_code"]
    [entry] = [check for check in found["checks"] if check["outcome"] == "warning"]
    assert (entry["name"], entry["texts"]) == ("node-pressure", ["node node-1 has DiskPressure"])
    assert "free memory or disk" in entry["fix"]
    BREAKS["network-policies"](healthy.world)
    BREAKS["directory"](healthy.world)
    code, text = healthy.world.run("doctor", healthy.path)
    assert code == exits.REFUSED
    assert "fix: KubeRay makes it when Serve runs" in text


def test_one_check_by_name_and_their_list(healthy: Healthy) -> None:
    code, found = healthy.world.run_json("doctor", healthy.path, "--check", "dns")
    assert (code, [check["name"] for check in found["checks"]]) == (exits.DONE, ["dns"])
    assert healthy.world.run("doctor", healthy.path, "--check", "nope")[0] == exits.ERROR
    code, text = healthy.world.run("doctor", healthy.path, "--list")
    assert code == exits.DONE
    assert "grace-drain" in text


def test_objects_of_another_shape_end_no_run(healthy: Healthy) -> None:
    node = healthy.world.running.find("Node", "gpu-1")
    assert node is not None
    node["spec"]["taints"] = [{"effect": "NoSchedule"}]
    healthy.world.running.put(node)
    found = outcomes(healthy)
    assert found["gpu-fault"][0] == UNKNOWN
    assert "another shape" in found["gpu-fault"][1][0]
    assert found["dns"][0] == OK
