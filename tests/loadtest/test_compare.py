"""Comparing two runs: what is found, what is not, and what a CI job gets for an exit code."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from loadtest.compare import Change, RunComparison, compare
from loadtest.goodput import Objective
from loadtest.record import Comparison, Line, Observation, RecordWriter, RunEnd
from loadtest.table import Recorded
from tests.loadtest.records import make_header, make_run, make_seen, make_stream_of_requests

OBJECTIVE = Objective(ttft_s=0.3, itl_s=0.1)


def changes(comparison: RunComparison) -> dict[str, Change]:
    return {change.metric: change for change in comparison.changes}


def verdicts(comparison: RunComparison) -> dict[str, str]:
    return {name: change.verdict for name, change in changes(comparison).items()}


def test_a_run_is_the_same_as_itself() -> None:
    run = make_stream_of_requests(300)
    comparison = compare(run, run, OBJECTIVE)
    assert set(verdicts(comparison).values()) == {"same"}
    assert comparison.exit_code == 0 and comparison.differences == []


def test_slower_is_worse_and_faster_is_better() -> None:
    usual, slow = make_stream_of_requests(400, seed=1), make_stream_of_requests(400, seed=2, slowness=1.3)
    worse, better = compare(usual, slow, OBJECTIVE), compare(slow, usual, OBJECTIVE)
    for name in ("ttft_p50_s", "ttft_p90_s", "itl_p50_s", "itl_p99_s", "tpot_p50_s", "e2e_p50_s"):
        assert verdicts(worse)[name] == "worse"
        assert verdicts(better)[name] == "better"
        change = changes(worse)[name]
        assert change.low <= 0.3 <= change.high
        assert change.low > 0.1
    assert (worse.exit_code, better.exit_code) == (1, 0)


def test_two_samples_of_one_server_are_not_told_apart() -> None:
    """Of sixteen metrics in twenty pairs, the 99 % intervals and the threshold leave hardly a false alarm."""
    runs = [make_stream_of_requests(150, seed=seed, num_tokens=8) for seed in range(21)]
    alarms = 0
    for first, second in itertools.pairwise(runs):
        found = verdicts(compare(first, second, OBJECTIVE))
        alarms += sum(verdict in ("worse", "better") for verdict in found.values())
    assert alarms <= 6  # 1 % of 320 are three


def test_a_change_below_the_threshold_does_not_count() -> None:
    usual = make_run([make_seen(i, float(i), [0.1, 0.2]) for i in range(50)])
    slower = make_run([make_seen(i, float(i), [0.104, 0.204]) for i in range(50)])
    assert verdicts(compare(usual, slower, OBJECTIVE))["ttft_p50_s"] == "same"
    assert verdicts(compare(usual, slower, OBJECTIVE, threshold=0.03))["ttft_p50_s"] == "worse"


def test_a_tail_of_few_requests_is_unclear() -> None:
    """One slow request of thirty moves the 99th percentile threefold, and tells nothing."""
    usual = make_run([make_seen(i, float(i), [0.1]) for i in range(30)])
    unlucky = make_run([make_seen(i, float(i), [0.3 if i == 7 else 0.1]) for i in range(30)])
    change = changes(compare(usual, unlucky, Objective()))["ttft_p99_s"]
    assert change.verdict == "unclear"
    assert change.low <= 0 <= change.change == pytest.approx(2.0)


def test_failures_count_against_goodput_in_points() -> None:
    fine = make_run([make_seen(i, float(i), [0.1]) for i in range(200)])
    failing = make_run([make_seen(i, float(i), [0.1], error="timeout" if i % 4 == 0 else None) for i in range(200)])
    found = changes(compare(fine, failing, OBJECTIVE))
    assert (found["error_share"].change, found["goodput_share"].change) == (0.25, -0.25)
    assert found["error_share"].verdict == found["goodput_share"].verdict == "worse"
    assert found["ttft_p50_s"].verdict == "same"


def test_answers_that_begin_to_differ_are_worse_at_once() -> None:
    seen = [make_seen(i, float(i), [0.1]) for i in range(50)]
    right = make_run(seen, comparisons=[Comparison(id=i, is_equal=True) for i in range(40)])
    wrong = make_run(seen, comparisons=[Comparison(id=i, is_equal=i != 3) for i in range(40)])
    assert verdicts(compare(right, wrong, OBJECTIVE))["unequal_share"] == "worse"
    assert verdicts(compare(wrong, right, OBJECTIVE))["unequal_share"] == "better"
    assert "unequal_share" not in verdicts(compare(make_run(seen), right, OBJECTIVE))


def test_the_same_seed_gives_the_same_intervals() -> None:
    first, second = make_stream_of_requests(100, seed=1), make_stream_of_requests(100, seed=2)
    same = [msgspec.json.encode(compare(first, second, OBJECTIVE, seed=5)) for _ in range(2)]
    assert same[0] == same[1] != msgspec.json.encode(compare(first, second, OBJECTIVE, seed=6))


def test_other_settings_are_named() -> None:
    seen = [make_seen(0, 0.0, [0.1])]
    comparison = compare(make_run(seen, seed=1, workload={"prompt": 8}), make_run(seen, seed=2), OBJECTIVE)
    assert comparison.differences == ["seed: 1 and 2", "workload: {'prompt': 8} and {}"]


@pytest.mark.parametrize("num", [0, 1, 2])
def test_tiny_runs_compare(num: int) -> None:
    tiny = make_run([make_seen(i, float(i), [0.1, 0.2]) for i in range(num)])
    many = make_stream_of_requests(30)
    assert compare(tiny, tiny, OBJECTIVE).exit_code == 0
    for comparison in (compare(tiny, many, OBJECTIVE), compare(many, tiny, OBJECTIVE)):
        for change in comparison.changes:
            assert change.verdict == "unclear" or change.low <= change.change <= change.high


def test_an_invalid_run_decides_nothing() -> None:
    seen = [make_seen(0, 0.0, [0.1])]
    comparison = compare(make_run(seen), make_run(seen, is_valid=False), OBJECTIVE)
    assert comparison.exit_code == 3 and comparison.invalid == ["B: the generator lagged"]


@pytest.mark.parametrize("name", ["threshold", "share_threshold"])
def test_thresholds_are_shares(name: str) -> None:
    run = make_run([])
    wrong: dict[str, Any] = {name: 1.5}
    with pytest.raises(ValueError, match=f"^{name} must be"):
        compare(run, run, OBJECTIVE, **wrong)


def write(path: Path, lines: Sequence[Line]) -> Path:
    writer = RecordWriter(path, make_header())
    for line in lines:
        writer.write(line)
    writer.close()
    return path


def observations(ttft_s: float) -> list[Observation]:
    return [make_seen(i, i / 10, [ttft_s, ttft_s + 0.02]) for i in range(60)]


def test_the_command_s_exit_codes_and_files(tmp_path: Path) -> None:
    end = RunEnd(duration_s=6, is_valid=True)
    usual = write(tmp_path / "usual.jsonl", [*observations(0.1), end])
    slow = write(tmp_path / "slow.jsonl", [*observations(0.2), end])
    cut = write(tmp_path / "cut.jsonl", observations(0.1))
    noise = tmp_path / "noise.jsonl"
    noise.write_text("noise")
    script = (
        "import sys, typer\nfrom loadtest import commands\n"
        "app = typer.Typer()\napp.command()(commands.report)\napp.command()(commands.compare)\n"
        "for line in sys.stdin:\n"
        "    try:\n        app(line.split())\n"
        "    except SystemExit as stop:\n        print('exit', stop.code)\n"
    )
    out = tmp_path / "out"
    commands = [
        f"compare {usual} {slow} --out {out} --slo-ttft 0.15",
        f"compare {slow} {usual}",
        f"compare {usual} {noise}",
        f"compare {usual} {tmp_path / 'none.jsonl'}",
        f"compare {usual} {slow} --threshold 7",
        f"compare {usual} {cut}",
        f"report {usual} --out {out} --slo-ttft 0.15 --slo-itl 0.1",
        f"report {cut}",
        f"report {usual} --slo-itl 0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert codes == [1, 0, 2, 2, 2, 3, 0, 3, 2], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert "noise.jsonl:1:" in errors[0] and "none.jsonl" in errors[1] and "threshold" in errors[2]
    assert json.loads((out / "compare.json").read_text())["exit_code"] == 1
    assert json.loads((out / "report.json").read_text())["summary"]["all"]["goodput_share"] == 1.0
    assert (out / "compare.html").is_file() and (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_many_requests_in_seconds() -> None:
    random = np.random.default_rng(0)
    firsts = random.lognormal(-2, 0.3, 20_000)
    run: Recorded = make_run(
        [make_seen(i, i / 50, [float(first), float(first) + 0.02]) for i, first in enumerate(firsts)]
    )
    comparison = compare(run, run, OBJECTIVE)
    assert len(comparison.changes) == 16 and comparison.exit_code == 0
