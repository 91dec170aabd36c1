"""`argosy loadtest knee`: the search drives real locust against a server of known delays, and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from loadtest.record import read_run
from tests.loadtest.load import fake_server


def knee(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.cli", "loadtest", "knee", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_search_leaves_a_record_of_each_run_and_one_report(tmp_path: Path) -> None:
    """The server answers after 20 ms and the promise is 5 s, so the rate doubles until the number of runs is up."""
    with fake_server("--ttft", "0.02", "--itl", "0.001") as url:
        flags = ["--rate", "8", "--duration", "1", "--output-tokens", "4", "--slo-ttft", "5", "--cool-down", "0"]
        flags += ["--max-runs", "2", "--max-send-lag", "5", "--max-loop-lag", "5", "--max-cpu", "9"]
        done = knee("--target", url, "--out", str(tmp_path), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    records = sorted(tmp_path.glob("*/loadtest.jsonl"))
    assert [read_run(record).header.arrivals["text"] for record in records] == ["poisson:8.0", "poisson:16.0"]
    found = json.loads((tmp_path / "report.json").read_text())["knee"]
    assert (found["rate_per_s"], found["reason"]) == (16.0, "max_runs")
    assert [trial["summary"]["all"]["goodput_share"] for trial in found["trials"]] == [1.0, 1.0]
    assert "Runs of the search" in (tmp_path / "report.html").read_text()


def test_a_search_without_a_promise_is_refused() -> None:
    done = knee("--rate", "1", "--duration", "1")
    assert done.returncode == 2 and "--slo-ttft" in done.stderr
