"""Arrival processes have the rates they claim; traces are read as they were recorded."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from loadtest.arrivals import Arrival, Arrivals
from loadtest.spec import SpecError


def times(text: str, num: int | None = None, seed: int = 0) -> list[float]:
    return [arrival.at_s for arrival in itertools.islice(Arrivals(text).times(seed), num)]


def gaps(at: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(at)]


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert times("constant:4", 5) == [0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("text", "cv"), [("poisson:5", 1.0), ("gamma:rate=5,cv=3", 3.0), ("gamma:rate=5,cv=0.5", 0.5)])
def test_random_gaps_have_the_mean_and_the_spread_asked_for(text: str, cv: float) -> None:
    found = gaps(times(text, 40_000))
    mean = statistics.fmean(found)
    assert mean == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(found) / mean == pytest.approx(cv, rel=0.06)


def test_steps_hold_their_rates_and_end() -> None:
    at = times("step:rates=50/0/200,every=20")
    counts = [sum(start <= t < start + 20 for t in at) for start in (0, 20, 40)]
    assert counts[0] == pytest.approx(1000, rel=0.1)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(4000, rel=0.06)
    assert at == sorted(at) and at[-1] < 60


@pytest.mark.parametrize("text", ["ramp:from=0,to=100,over=100", "ramp:from=100,to=0,over=100"])
def test_a_ramp_has_a_quarter_of_its_arrivals_in_its_lower_half(text: str) -> None:
    at = times(text)
    assert len(at) == pytest.approx(5000, rel=0.06)
    lower = sum((t < 50) == ("from=0" in text) for t in at)
    assert lower / len(at) == pytest.approx(0.25, abs=0.03)


def test_a_day_is_busiest_at_its_noon() -> None:
    at = [t for t in times("diurnal:rate=20,swing=1,period=100", 6000) if t < 200]
    assert len(at) == pytest.approx(4000, rel=0.07)
    night = sum(t % 100 < 25 or t % 100 > 75 for t in at)
    assert night / len(at) == pytest.approx(0.5 - 1 / 3.14159, abs=0.03)


def test_a_seed_fixes_the_times() -> None:
    for text in ("poisson:3", "gamma:3", "diurnal:rate=3", "ramp:to=9,over=30"):
        assert times(text, 50, seed=1) == times(text, 50, seed=1) != times(text, 50, seed=2)


def test_traces_of_either_kind(tmp_path: Path) -> None:
    lines = tmp_path / "trace.jsonl"
    lines.write_text('{"timestamp": 2500, "input_length": 7, "output_length": 3}\n\n{"timestamp": 2000}\n')
    assert Arrivals(f"trace:file={lines},unit=ms").trace == [Arrival(0.0), Arrival(0.5, 7, 3)]
    assert Arrivals(f"trace:file={lines},unit=ms,speed=2").trace[1].at_s == 0.25
    table = tmp_path / "trace.csv"
    table.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,9,1\n"
    )
    assert [(arrival.prompt_tokens, arrival.output_tokens) for arrival in Arrivals(f"trace:{table}").trace] == [
        (374, 44),
        (9, 1),
    ]
    assert Arrivals(f"trace:{table}").trace[1].at_s == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("often:3", "'often' is none of constant, poisson"),
        ("poisson:0", "rate must be above 0, got 0"),
        ("poisson:nan", "rate must be above 0, got nan"),
        ("poisson:many", "rate must be a number, got 'many'"),
        ("gamma:rate=1,shape=2", "gamma takes rate, cv, got 'shape=2'"),
        ("step:rates=1/-1,every=3", "rates must be above"),
        ("ramp:to=3", "over is missing"),
        ("diurnal:rate=1,swing=2", "swing must be at most 1, got 2"),
        ("trace:/nowhere.jsonl", "No such file"),
    ],
)
def test_bad_texts_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Arrivals(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no arrivals"), ('{"when": 3}\n', "line 1: none of t_s"), ("[1]\n", "JSON object"), ("{\n", "Expecting")],
)
def test_bad_traces_are_refused_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(SpecError, match=message):
        Arrivals(f"trace:{path}")
