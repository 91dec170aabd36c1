"""deploy, plan and render against an API server over HTTP: waves, waits, reasons, conflicts, atomic returns."""

from __future__ import annotations

import json

import pytest
import yaml

from k8s.tool import commands, exits
from tests.k8s.cluster_fixture import World, running, world

__all__ = ["running", "world"]


def test_a_deployment_of_the_smallest_overlay_is_whole_and_then_nothing_is_left_to_change(world: World) -> None:
    code, text = world.run("plan", "dev-cpu")
    assert code == exits.CHANGES, text
    assert "create RayService argosy" in text

    code, text = world.deploy()
    assert code == exits.DONE, text
    assert world.running.find("RayService", "argosy") is not None
    assert world.running.find("Secret", "argosy-engine") is not None
    order = [call for call in world.running.state.calls if call.startswith("PATCH") and "dryRun" not in call]
    places = [next(i for i, call in enumerate(order) if part in call) for part in
              ("/namespaces/argosy?", "resourcequotas", "configmaps", "rayservices", "deployments")]  # fmt: skip
    assert places == sorted(places)

    code, text = world.run("plan", "dev-cpu")
    assert code == exits.DONE, text
    assert "Nothing to change" in text


def test_render_prints_the_same_bytes_and_valid_yaml(world: World) -> None:
    (code, first), (_, second) = world.run("render", "dev-cpu"), world.run("render", "dev-cpu")
    assert code == exits.DONE
    assert first == second
    assert "RayService" in {thing["kind"] for thing in yaml.safe_load_all(first)}


def test_events_are_json_lines(world: World) -> None:
    code, text = world.deploy("dev-cpu", "-o", "json")
    assert code == exits.DONE
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["wave"] for event in events if event["event"] == "applied"] == [
        "policy",
        "config",
        "engine",
        "gateway",
    ]
    assert events[-1]["event"] == "done"


@pytest.mark.parametrize("arguments", [["nope"], ["plan"], ["plan", "--nope"], ["plan", "no-such-overlay"]])
def test_wrong_usage_is_an_error_and_never_the_code_of_changes(arguments: list[str]) -> None:
    assert commands.main(arguments) == exits.ERROR
