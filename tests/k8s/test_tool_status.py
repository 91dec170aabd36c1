"""status: healthy, degraded, down, and what may not be read; from one list for each kind."""

from __future__ import annotations

import pytest

from k8s.tool import exits
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.fleets import start_fleet

__all__ = ["running", "world"]


def test_a_healthy_deployment(world: World) -> None:
    fleet = start_fleet(world, replicas=2)
    world.running.state.calls.clear()
    code, found = world.run_json("status")
    assert code == exits.DONE == found["exit_code"]
    assert (found["health"], found["why"]) == ("healthy", [])
    assert [replica["pods"] for replica in found["replicas"]] == [[pod] for pod in fleet.pods]
    lists = [call for call in world.running.state.calls if call.startswith("GET") and "proxy" not in call]
    assert len(lists) == len({call.partition("?")[0] for call in lists})
    code, text = world.run("status")
    assert code == exits.DONE
    assert "argosy in argosy: healthy, revision 1 (good)" in text
    assert "worker-1" in text
    assert "10 %" in text


@pytest.mark.parametrize("state", ["stalled", "down", "loading"])
def test_a_replica_that_does_not_serve_degrades_it(world: World, state: str) -> None:
    fleet = start_fleet(world, replicas=2)
    fleet.states["r1"] = state
    code, found = world.run_json("status")
    assert code == exits.CHANGES
    assert "1 of 2 engine replicas are ready" in found["why"]
    assert f"replica r1 is {state}" in found["why"]


def test_without_a_ready_replica_or_gateway_it_is_down(world: World) -> None:
    fleet = start_fleet(world, replicas=1)
    fleet.states["r0"] = "stalled"
    code, found = world.run_json("status")
    assert (code, found["health"]) == (exits.REFUSED, "down")
    assert found["why"][0] == "no engine replica is ready"
    fleet.states.clear()
    for pod in world.running.all("Pod"):
        if "gateway" in pod["metadata"]["name"]:
            pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
            world.running.put(pod)
    code, found = world.run_json("status")
    assert (code, found["health"]) == (exits.REFUSED, "down")
    assert found["why"][0] == "no gateway is ready"


def test_nothing_there_is_down(world: World) -> None:
    code, found = world.run_json("status", "-n", "elsewhere")
    assert code == exits.REFUSED
    assert "there is no RayService argosy in elsewhere" in found["why"]


def test_what_may_not_be_read_is_not_known_and_nothing_crashes(world: World) -> None:
    start_fleet(world, replicas=1)
    for kind in ("events", "secrets", "horizontalpodautoscalers", "resourcequotas"):
        world.running.fault(f"GET */{kind}", status=403)
    code, found = world.run_json("status")
    assert code == exits.DONE
    assert found["unknown"]["Event"] == "needs list on events"
    assert found["revisions"] is None
    world.running.fault("GET */pods", status=403)
    code, found = world.run_json("status")
    assert code == exits.CHANGES
    assert found["why"] == ["pods are not known: needs list on pods"]


def test_gateways_behind_a_network_policy_are_asked_from_within(world: World) -> None:
    fleet = start_fleet(world, replicas=1)
    world.running.state.pages.clear()

    def execute(pod: str, container: str, command: list[str]) -> tuple[int, str]:
        import json

        assert container == "gateway"
        assert command[-1] == "http://127.0.0.1:8000/progressz"
        return 0, json.dumps(fleet.progress())

    world.running.state.on_exec = execute
    code, found = world.run_json("status")
    assert code == exits.DONE
    assert [replica["id"] for replica in found["replicas"]] == ["r0"]


def test_an_upgrade_and_a_failed_revision_show(world: World) -> None:
    start_fleet(world, replicas=1)
    service = world.running.find("RayService", "argosy")
    assert service is not None
    service["status"]["conditions"][1]["status"] = "True"
    service["status"]["pendingServiceStatus"] = {
        "rayClusterName": "argosy-next",
        "trafficRoutedPercent": 30,
        "applicationStatuses": {"model": {"status": "DEPLOYING", "message": "loading"}},
    }
    world.running.put(service)
    revision = world.running.find("Secret", "argosy-revision-000001")
    assert revision is not None
    revision["metadata"]["labels"]["argosy/status"] = "failed"
    world.running.put(revision)
    code, found = world.run_json("status")
    assert code == exits.CHANGES
    assert [entry["role"] for entry in found["clusters"]] == ["active", "pending"]
    why = " ".join(found["why"])
    assert "an upgrade is under way" in why
    assert "Serve application model: DEPLOYING loading" in why
    assert "the last revision, 1, is failed" in why
