"""drain: rows reach zero before the eviction, budgets are honoured, too much at once is refused, cuts are told."""

from __future__ import annotations

import pytest

from k8s.tool import exits
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.fleets import start_fleet
from tests.k8s.operators import make_node

__all__ = ["running", "world"]


def drain(world: World, target: str, *more: str, timeout: str = "10") -> tuple[int, str]:
    return world.run("drain", target, "--poll", "0.02", "--timeout", timeout, "--max-disruption", "25%", *more)


def test_a_replica_leaves_only_when_its_requests_have_moved(world: World) -> None:
    fleet = start_fleet(world)
    fleet.rows, fleet.pace = {"r1": 3}, 1
    rows_at_eviction: list[int] = []

    def evicted(server: object, pod: dict[str, object]) -> None:
        rows_at_eviction.append(fleet.rows["r1"])
        world.running.server.drop(pod)  # type: ignore[arg-type]

    world.running.state.on_evict = evicted  # type: ignore[assignment]
    code, text = drain(world, "r1")
    assert code == exits.DONE, text
    assert rows_at_eviction == [0]
    assert world.running.state.evicted == [fleet.pods[1]]
    assert "no request was running on what left" in text
    marked = fleet.commands[-1]
    assert marked[:2] == ["ray", "drain-node"]
    assert marked[marked.index("--node-id") + 1] == f"id-{fleet.pods[1]}"
    assert 1 <= int(marked[marked.index("--deadline-remaining-seconds") + 1]) <= 30


def test_a_node_is_cordoned_first_and_a_pod_can_be_named_as_well(world: World) -> None:
    fleet = start_fleet(world)
    world.running.put(make_node("worker-2"))
    code, text = drain(world, "worker-2")
    assert code == exits.DONE, text
    assert (world.running.find("Node", "worker-2") or {})["spec"]["unschedulable"] is True
    assert world.running.state.evicted == [fleet.pods[2]]
    world.running.state.evicted.clear()
    for budget in world.running.all("PodDisruptionBudget"):
        budget["status"]["disruptionsAllowed"] = 1
        world.running.put(budget)
    assert drain(world, fleet.pods[0], "--max-disruption", "75%")[0] == exits.DONE
    assert world.running.state.evicted == [fleet.pods[0]]


def test_a_budget_that_allows_nothing_holds_the_pod_until_time_is_up(world: World) -> None:
    start_fleet(world)
    for budget in world.running.all("PodDisruptionBudget"):
        budget["status"]["disruptionsAllowed"] = 0
        world.running.put(budget)
    code, text = drain(world, "r0", timeout="0.5")
    assert code == exits.UNFINISHED
    assert "a PodDisruptionBudget holds Pod" in text
    assert world.running.state.evicted == []


def test_a_budget_that_frees_itself_lets_the_drain_go_on(world: World) -> None:
    start_fleet(world)
    for budget in world.running.all("PodDisruptionBudget"):
        budget["status"]["disruptionsAllowed"] = 0
        world.running.put(budget)
    held = world.running.fault("POST *eviction", status=0, times=3)

    def free(server: object, event: str, thing: dict[str, object]) -> None:
        del server, event, thing

    world.running.state.controllers.append(free)  # type: ignore[arg-type]
    import threading

    def open_up() -> None:
        while held.times > 0:
            pass
        for budget in world.running.all("PodDisruptionBudget"):
            budget["status"]["disruptionsAllowed"] = 1
            world.running.put(budget)

    thread = threading.Thread(target=open_up)
    thread.start()
    code, text = drain(world, "r0")
    thread.join()
    assert code == exits.DONE, text
    assert len(world.running.state.evicted) == 1


@pytest.mark.parametrize("share", ["10%", "25%"])
def test_more_than_the_allowed_share_is_refused_and_nothing_changes(world: World, share: str) -> None:
    fleet = start_fleet(world)
    fleet.states["r3"] = "stalled"
    code, text = world.run("drain", "r0", "--max-disruption", share)
    assert code == exits.REFUSED
    assert "of 4 replicas is 1 at once; 1 are away already and this takes 1 more" in text
    assert world.running.state.evicted == []
    assert fleet.commands == []
    assert drain(world, "r0", "--max-disruption", "50%")[0] == exits.DONE


def test_two_replicas_of_one_node_count_twice(world: World) -> None:
    fleet = start_fleet(world)
    for name in fleet.pods[:2]:
        pod = world.running.find("Pod", name)
        assert pod is not None
        pod["spec"]["nodeName"] = "shared"
        world.running.put(pod)
    world.running.put(make_node("shared"))
    code, text = drain(world, "shared")
    assert code == exits.REFUSED
    assert "takes 2 more" in text
    assert "unschedulable" not in (world.running.find("Node", "shared") or {})["spec"]


def test_the_last_replica_is_not_taken_without_saying_so(world: World) -> None:
    start_fleet(world, replicas=1)
    code, text = drain(world, "r0")
    assert code == exits.REFUSED
    assert "no ready one of 1 replicas would be left" in text
    assert drain(world, "r0", "--max-disruption", "100%")[0] == exits.DONE


def test_requests_that_are_left_when_time_is_up_are_told(world: World) -> None:
    fleet = start_fleet(world)
    fleet.rows = {"r2": 7}
    code, text = drain(world, "r2", timeout="0.4")
    assert "replica r2 had 7 requests when its time was up" in text
    assert world.running.state.evicted == [fleet.pods[2]]
    assert code in (exits.DONE, exits.UNFINISHED)


def test_without_exec_the_pod_drains_itself_and_that_is_said(world: World) -> None:
    fleet = start_fleet(world)
    world.running.state.on_exec = None
    code, text = drain(world, "r0")
    assert code == exits.DONE, text
    assert "is not marked, and drains itself after the eviction" in text
    assert "needs create on pods/exec" in text
    assert world.running.state.evicted == [fleet.pods[0]]


def test_without_the_right_to_cordon_nothing_is_done(world: World) -> None:
    start_fleet(world)
    world.running.put(make_node("worker-1"))
    world.running.fault("PATCH */nodes/*", status=403)
    code, text = drain(world, "worker-1")
    assert code == exits.REFUSED
    assert "needs patch on nodes; --no-cordon" in text
    assert world.running.state.evicted == []
    assert drain(world, "worker-1", "--no-cordon")[0] == exits.DONE


def test_without_gateways_that_tell_no_replica_is_taken(world: World) -> None:
    fleet = start_fleet(world)
    world.running.state.pages.clear()
    code, text = drain(world, fleet.pods[0])
    assert code == exits.REFUSED
    assert "which replicas would leave is not known" in text


def test_a_pod_that_stays_is_reported(world: World) -> None:
    fleet = start_fleet(world)
    world.running.state.on_evict = lambda server, pod: None
    code, text = drain(world, "r0", timeout="0.4")
    assert code == exits.UNFINISHED
    assert f"not gone in time: {fleet.pods[0]}" in text


def test_a_pod_that_has_gone_by_itself_is_no_error(world: World) -> None:
    fleet = start_fleet(world)
    world.running.fault("POST *eviction", status=404)
    pod = world.running.find("Pod", fleet.pods[0])
    assert pod is not None

    def vanish(name: str, container: str, command: list[str]) -> tuple[int, str]:
        if command[1] == "drain-node":
            world.running.server.drop(pod)
        return fleet.execute(name, container, command)

    world.running.state.on_exec = vanish
    assert drain(world, "r0")[0] == exits.DONE


def test_what_is_nothing_is_named(world: World) -> None:
    start_fleet(world)
    code, text = drain(world, "nowhere")
    assert code == exits.ERROR
    assert "'nowhere' is no node with pods of argosy, no pod of it and no replica (r0, r1, r2, r3)" in text
    assert world.run("drain", "r0", "--max-disruption", "0%")[0] == exits.ERROR
