"""`argosy explain` as its users run it, against a gateway with a scripted data plane."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.errors import NoCapacity
from tests.gateway.world import Script, World, a_world

ENV = {"COLUMNS": "150", "NO_COLOR": "1"}


def explain(world: World, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["explain", "--url", world.url, *arguments], env=ENV)
    return done.exit_code, done.output


def test_the_timeline_and_the_list() -> None:
    with a_world(Script(gap_s=0.002)) as world:
        name = world.complete().json()["id"]
        world.complete(max_tokens=-1)
        code, listed = explain(world)
        assert code == 0
        refused, finished = [line for line in listed.splitlines() if "req-" in line or "cmpl-" in line]
        assert "refused: invalid_value" in refused and name in finished and "finished" in finished
        code, told = explain(world, name)
        assert code == 0
        lines = told.splitlines()
        assert lines[0].startswith(f"{name}  finished after ")
        kinds = [line.split()[-1] if "finished" in line else line for line in lines]
        assert any("tokenised" in line for line in kinds) and "reason stop" in told
        assert "hello" not in told


def test_a_failure_is_told_with_its_reason() -> None:
    with a_world() as world:
        world.plane.refusal = NoCapacity("The queue is full.", retry_after_s=1)
        reply = world.complete()
        code, told = explain(world, reply.headers["x-request-id"])
        assert code == 0 and "no_capacity: The queue is full." in told


def test_machines_get_json_and_traces(tmp_path: Path) -> None:
    with a_world() as world:
        name = world.complete().json()["id"]
        code, told = explain(world, name, "-o", "json")
        assert code == 0 and json.loads(told)["id"] == name
        file = tmp_path / "trace.json"
        assert explain(world, name, "--chrome", str(file))[0] == 0
        assert json.loads(file.read_text())["otherData"]["id"] == name
        assert explain(world, "--chrome", str(file)) == (1, "error: --chrome: name the request\n")
        code, told = explain(world, name, "--chrome", str(tmp_path / "no" / "folder"))
        assert code == 1 and "No such file" in told


def test_what_cannot_be_told_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    with a_world() as world:
        code, told = explain(world, "cmpl-\x1b[31mnone")
        assert code == 1 and "No request" in told and "\x1b" not in told
        assert explain(world, "-o", "xml")[0] == 2
        token = tmp_path / "token"
        token.write_text("short")
        code, told = explain(world, "--operator-token-file", str(token))
        assert code == 1 and "5 bytes, not 16 to 4096" in told
    code, told = explain(world)
    assert code == 1 and "is `argosy serve` running?" in told


@pytest.mark.parametrize("columns", ["60", "100"])
def test_narrow_terminals_get_all_of_it(columns: str) -> None:
    with a_world() as world:
        name = world.complete().json()["id"]
        done = CliRunner().invoke(app, ["explain", "--url", world.url, name], env=ENV | {"COLUMNS": columns})
    assert done.exit_code == 0 and "finished" in done.output
