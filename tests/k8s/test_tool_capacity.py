"""What fits on made-up nodes, and what the others are said to lack."""

from __future__ import annotations

from typing import Any

import pytest

from k8s.tool import exits, quantities
from k8s.tool.capacity import place, rooms, why_not
from k8s.tool.demand import worker_template
from k8s.tool.specs import find_spec, objects_of
from tests.k8s.api_json import Object
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.operators import make_node, make_pod

__all__ = ["running", "world"]

H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
GPU_TAINT = [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", 0.5),
        ("2", 2.0),
        ("1Gi", 2.0**30),
        ("536870912Ki", 2.0**39),  # as kubelets tell a node's memory
        ("2K", None),
        ("1e3", 1e3),
        ("1.5G", 1.5e9),
        ("100u", 1e-4),
        ("x", None),
        ("", None),
    ],
)
def test_quantities(text: str, number: float | None) -> None:
    found = quantities.number(text)
    assert found == pytest.approx(number) if number is not None else found is None


def test_a_pod_asks_for_its_largest_init_container_and_its_sidecars() -> None:
    def container(cpu: str, **more: str) -> Object:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {"containers": [container("1"), container("2")], "initContainers": [container("5")]}
    assert quantities.pod_requests(spec)["cpu"] == 5.0
    spec["initContainers"] = [container("1", restartPolicy="Always")]
    assert quantities.pod_requests(spec)["cpu"] == 4.0
    assert quantities.pod_requests({"containers": [{"resources": {"limits": {"x/gpu": "8"}}}]})["x/gpu"] == 8.0


def gpu_node(name: str, gpus: int = 8, **more: Any) -> Object:
    return make_node(
        name, gpus=gpus, cpus="128", memory="2048Gi", labels=more.pop("labels", H100), taints=GPU_TAINT, **more
    )


def pod_of_others(node: str, gpus: int, priority: int = 0) -> Object:
    resources = {"requests": {"nvidia.com/gpu": str(gpus)}}
    return {
        "metadata": {"name": f"other-{node}", "namespace": "other"},
        "spec": {"nodeName": node, "priority": priority, "containers": [{"resources": resources}]},
        "status": {"phase": "Running"},
    }


def template(overlay: str) -> Object:
    return worker_template(next(thing for thing in objects_of(find_spec(overlay)) if thing["kind"] == "RayService"))


def test_three_of_four_replicas_fit_and_the_fourth_lacks_two_gpus() -> None:
    nodes = [gpu_node(f"h100-{i}") for i in range(1, 5)]
    pods = [pod_of_others("h100-3", 2, priority=2_000_000)]
    fit = place(rooms(nodes, pods, priority=800_000, is_ours=lambda _: False), template("prod-h100-tp8"), units=4)
    assert (fit.placed, fit.asked) == (3, 4)
    assert fit.lacking["h100-3"] == "lacks 2 GPUs of 8 GPUs"
    assert "lacks 8 GPUs of 8 GPUs" in fit.lacking["h100-1"]


def test_what_lower_priorities_hold_counts_as_free() -> None:
    nodes, pods = [gpu_node("h100-1")], [pod_of_others("h100-1", 8, priority=-10)]
    found = rooms(nodes, pods, priority=800_000, is_ours=lambda _: False)
    assert place(found, template("prod-h100-tp8"), units=1).placed == 1
    assert found[0].by_preemption["nvidia.com/gpu"] == 8.0


def test_a_replica_of_two_hosts_is_placed_whole_or_not_at_all() -> None:
    nodes = [gpu_node(f"h100-{i}") for i in range(3)]
    found = rooms(nodes, [], priority=0, is_ours=lambda _: False)
    fit = place(found, template("prod-multihost-tp8-pp2"), units=2, pods_per_unit=2)
    assert fit.placed == 1
    assert sorted(room.free["nvidia.com/gpu"] for room in found) == [0.0, 0.0, 8.0]


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (gpu_node("n", unschedulable=True), "is cordoned"),
        (gpu_node("n", conditions=[{"type": "Ready", "status": "Unknown"}]), "is not ready"),
        (gpu_node("n", labels={"nvidia.com/gpu.product": "A100"}), "has no label nvidia.com/gpu.product"),
        (gpu_node("n", gpus=4), "lacks 4 GPUs of 8 GPUs"),
        (make_node("n", gpus=8, cpus="2", labels=H100), "CPUs"),
    ],
)
def test_each_reason_is_said(node: Object, why: str) -> None:
    [room] = rooms([node], [], priority=0, is_ours=lambda _: False)
    spec = template("prod-h100-tp8")
    assert why in why_not(room, spec, quantities.pod_requests(spec))


def test_untolerated_taints_and_node_affinity() -> None:
    taints = [{"key": "team", "value": "x", "effect": "NoExecute"}]
    node = make_node("n", taints=taints, labels={"nvidia.com/gpu.present": "true"})
    [room] = rooms([node], [], priority=0, is_ours=lambda _: False)
    text = why_not(room, template("dev-cpu"), {})
    assert "has the taint team=x:NoExecute" in text
    assert "node affinity on nvidia.com/gpu.present" in text


def test_the_command_counts_a_whole_spec_as_if_it_did_not_run_yet(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    code, found = world.run_json("capacity", "dev-cpu")
    assert code == exits.DONE
    assert found["parts"]["engine replicas"] == {"asked": 1, "placed": 1, "nodes": [["node-1"]], "lacking": {}}
    code, text = world.run("capacity", "dev-cpu", "--replicas", "1000")
    assert code == exits.CHANGES
    assert "of 1000 engine replicas" in text
    assert "node node-1 lacks" in text


def test_without_the_right_to_read_nodes_it_says_what_it_needs(world: World) -> None:
    world.running.fault("GET */nodes", status=403)
    code, text = world.run("capacity", "dev-cpu")
    assert code == exits.ERROR
    assert "needs list on nodes and on pods of all namespaces" in text


def test_a_pod_that_has_ended_takes_no_room() -> None:
    container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": "3"}}}
    pod = make_pod("p", "x", {"metadata": {"labels": {}}, "spec": {"containers": [container]}}, node="n")
    [room] = rooms([make_node("n", cpus="4")], [pod], priority=0, is_ours=lambda _: False)
    assert room.free["cpu"] == 1.0
    pod["status"]["phase"] = "Succeeded"
    [room] = rooms([make_node("n", cpus="4")], [pod], priority=0, is_ours=lambda _: False)
    assert room.free["cpu"] == 4.0
