"""preflight: a Job on each GPU node that waits for it; who passes loses its taint, and only its taint."""

from __future__ import annotations

import pytest

from k8s.gpu_guard import FAULT, UNVERIFIED
from k8s.tool import exits
from tests.k8s.api_json import Object
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.operators import make_node

__all__ = ["running", "world"]

GPU = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
NEW = {"key": UNVERIFIED, "effect": "NoSchedule"}
SICK = {"key": FAULT, "effect": "NoExecute", "value": "xid-79"}


def preflight(world: World, *more: str) -> tuple[int, str]:
    return world.run("preflight", "single-gpu", *more, "--poll", "0.02", "--timeout", "3")


def taints(world: World, name: str) -> list[str]:
    return [taint["key"] for taint in (world.running.find("Node", name) or {})["spec"]["taints"]]


def test_nodes_that_pass_lose_the_taint(world: World) -> None:
    for name, marks in (("a", [GPU, NEW]), ("b", [GPU, NEW]), ("c", [GPU])):
        world.running.put(make_node(name, gpus=8, taints=marks))
    conflict = world.running.fault("PATCH */nodes/a", status=409, times=2)
    code, text = preflight(world)
    assert code == exits.DONE, text
    assert taints(world, "a") == taints(world, "b") == ["nvidia.com/gpu"]
    assert conflict.times == 0
    jobs = world.running.all("Job")
    assert sorted(job["metadata"]["annotations"]["argosy/node"] for job in jobs) == ["a", "b"]
    pod = jobs[0]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-1] == "cuda:7"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_node_that_fails_keeps_it_and_says_what_broke(world: World) -> None:
    world.running.put(make_node("a", gpus=2, taints=[GPU, NEW]))

    def fail(server: object, event: str, thing: Object) -> None:
        if thing["kind"] == "Job" and event == "ADDED":
            thing["status"] = {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}
            world.running.server.store(thing)
            message = "cuda:1: 3 of 4194304 products are wrong"
            state = {"terminated": {"exitCode": 1, "message": message}}
            world.running.server.store(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": "t", "namespace": "argosy", "labels": {"job-name": thing["metadata"]["name"]}},
                    "spec": {"containers": []},
                    "status": {"phase": "Failed", "containerStatuses": [{"name": "preflight", "state": state}]},
                }
            )

    world.running.state.controllers.insert(0, fail)  # type: ignore[arg-type]
    code, text = preflight(world)
    assert code == exits.UNFINISHED
    assert "node a: cuda:1: 3 of 4194304 products are wrong" in text
    assert UNVERIFIED in taints(world, "a")


def test_a_repaired_node_is_named_and_its_fault_cleared_only_when_asked(world: World) -> None:
    world.running.put(make_node("a", gpus=8, taints=[GPU, SICK]))
    assert "no GPU node has the taint" in preflight(world)[1]
    assert preflight(world, "a")[0] == exits.DONE
    assert FAULT in taints(world, "a")
    assert preflight(world, "a", "--clear-fault")[0] == exits.DONE
    assert taints(world, "a") == ["nvidia.com/gpu"]


def test_gpus_in_use_are_not_tested(world: World) -> None:
    world.running.put(make_node("a", gpus=8, taints=[GPU, NEW]))
    container = {"name": "c", "image": "i", "resources": {"requests": {"nvidia.com/gpu": "4"}}}
    world.running.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "busy", "namespace": "other"},
            "spec": {"nodeName": "a", "containers": [container]},
            "status": {"phase": "Running"},
        }
    )
    code, text = preflight(world)
    assert code == exits.UNFINISHED
    assert "4 of its GPUs are in use; drain it first" in text
    assert world.running.all("Job") == []


@pytest.mark.parametrize("right", ["GET */nodes", "PATCH */nodes/*"])
def test_missing_rights_are_named(world: World, right: str) -> None:
    world.running.put(make_node("a", gpus=8, taints=[GPU, NEW]))
    world.running.fault(right, status=403)
    _, text = preflight(world)
    assert "needs list on nodes" in text or "needs patch on nodes" in text
    assert UNVERIFIED in taints(world, "a")


def test_wrong_names_and_specs(world: World) -> None:
    assert "'x' is no GPU node; there are none" in preflight(world, "x")[1]
    code, text = world.run("preflight", "dev-cpu")
    assert code == exits.ERROR
    assert "engine.device of the spec is cpu" in text
