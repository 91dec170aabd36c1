"""Every `argosy k8s` line of the runbook, and of the doctor's fixes, is a command that exists and runs."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main

from k8s import render
from k8s.tool import commands, exits
from k8s.tool.diagnosis import CHECKS
from tests.k8s.api_json import Object
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.fleets import start_fleet
from tests.k8s.operators import make_node

__all__ = ["running", "world"]

RUNBOOK = (render.ROOT / "RUNBOOK.md").read_text(encoding="utf-8")
TOPICS = (
    "Deploy",
    "Upgrade",
    "Roll back",
    "Drain",
    "node is lost",
    "head is lost",
    "Out of",
    "Pending",
    "GPU",
    "Rotate",
)
GPU = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}


def lines() -> list[str]:
    """In code blocks, without comments, each once."""
    found = [line.strip().partition("#")[0].strip() for line in RUNBOOK.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`(argosy k8s [a-z]+ [^`|]*)`", RUNBOOK)
    return list(dict.fromkeys(line for line in [*found, *inline] if line.startswith("argosy k8s ")))


def test_every_topic_has_a_section_with_commands() -> None:
    for topic in TOPICS:
        [section] = [part for part in RUNBOOK.split("\n## ")[1:] if topic in part.partition("\n")[0]]
        assert "argosy k8s " in section, topic


def test_the_table_of_exit_codes_is_the_tool_s() -> None:
    for code, meaning in exits.MEANINGS.items():
        assert f"| {code} | {meaning} |" in RUNBOOK


def test_every_command_of_the_runbook_runs(world: World) -> None:
    """No line ends in an error; a refusal or a finding is an answer."""
    fleet = start_fleet(world, replicas=4)
    spec = world.spec_file(
        engine={"min_replicas": 4, "max_replicas": 4}, gateway={"min_replicas": 2, "max_replicas": 2, "cpus": 0.5}
    )
    world.running.put(make_node("worker-1"), make_node("gpu-1", gpus=8, taints=[GPU]))
    failed = []
    found = lines()
    assert len(found) >= 20
    for line in found:
        arguments = shlex.split(line)[2:]
        node = "gpu-1" if arguments[0] == "preflight" else "worker-1"
        values = {"SPEC": "single-gpu" if arguments[0] == "preflight" else spec, "NODE": node, "REPLICA": "r0"}
        arguments = [values.get(argument, argument) for argument in arguments]
        quick = {
            "deploy": ["--settle", "0", "--timeout", "5", "--patience", "0"],
            "rollback": ["--settle", "0", "--timeout", "5"],
            "scale": ["--settle", "0", "--timeout", "5"],
            "drain": ["--timeout", "1", "--poll", "0.02"],
            "preflight": ["--timeout", "1", "--poll", "0.02"],
        }
        code, text = world.run(*arguments, *quick.get(arguments[0], []))
        if code == exits.ERROR or "Traceback" in text:
            failed.append((line, code, text))
        fleet.states.clear()
    assert failed == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_fixes_name_commands_and_flags_that_exist(check: Object) -> None:
    known = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]
    for text in re.findall(r"`argosy k8s ([^`]+)`", check.fix):  # type: ignore[attr-defined]
        name, *rest = text.split()
        flags = {flag for parameter in known[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= flags
