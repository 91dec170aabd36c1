"""Running things beside a test: the fake server, and the command with real locust, both as processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from loadtest.record import Run, read_run


@contextlib.contextmanager
def fake_server(*flags: str) -> Iterator[str]:
    """The URL of tests/loadtest/fake_server.py in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("fake_server.py")), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def log_of(url: str) -> list[dict[str, Any]]:
    """What the fake server saw."""
    requests: list[dict[str, Any]] = httpx.get(f"{url}/log").json()["requests"]
    return requests


@dataclasses.dataclass(frozen=True)
class Ran:
    code: int
    run: Run
    output: str


LENIENT = ("--max-send-lag", "5", "--max-loop-lag", "5", "--max-cpu", "2")


def load(url: str, out: Path, *flags: str, cores: str | None = None, is_strict: bool = False) -> Ran:
    """`argosy loadtest` with real locust, to its end. cores: those that it may use.

    is_strict: with the bounds that users get. Otherwise whatever else this machine does makes no run invalid.
    """
    pinned = ["taskset", "-c", cores] if cores else []
    command = [*pinned, sys.executable, "-m", "serving.cli", "loadtest", "--target", url, "--out", str(out)]
    bounds = () if is_strict else LENIENT
    ran = subprocess.run([*command, "--no-report", *bounds, *flags], capture_output=True, text=True, timeout=120)
    output = ran.stdout + ran.stderr
    assert (out / "loadtest.jsonl").exists(), output
    return Ran(ran.returncode, read_run(out / "loadtest.jsonl"), output)


def body(**fake: Any) -> tuple[str, str]:
    """Flags that tell the fake server what to do."""
    return "--extra-body", json.dumps({"fake": fake})
