"""The steps that a gateway hears of, on its own clock, and what they say of a gap."""

from __future__ import annotations

import random
from typing import Any

import pytest

from serving.gateway.choice_life import GAP_CAUSES
from serving.gateway.steps import SeenStep, StepLog, gap_cause
from serving.types import StepRecord


def record(started_s: float, duration_s: float, **others: Any) -> StepRecord:
    fields = {
        "announced_s": duration_s,
        "ideal_s": None,
        "num_rows": 4,
        "num_prefill_tokens": 0,
        "num_decode_tokens": 4,
    }
    return StepRecord(
        started_s=started_s, duration_s=duration_s, **{**fields, "num_waiting": 0, "blocks_used": 9, **others}
    )


def test_steps_come_onto_the_gateways_clock_whatever_the_network_adds() -> None:
    draw, log, offset_s = random.Random(1), StepLog(), 4321.5
    at = 100.0
    for number in range(300):
        late_s = 0.0003 + (number % 20 != 0) * draw.expovariate(200)
        step = log.add(number, record(at, 0.01), at + 0.01 + offset_s + late_s)
        if number:  # the first is as late as it is: nothing is known before it
            assert 0.0003 - 1e-9 <= step.started_at - (at + offset_s) <= 0.0005
        assert step.ended_at - step.started_at == pytest.approx(0.01)
        at += 0.012


def test_clocks_that_drift_apart_are_followed() -> None:
    log, at = StepLog(), 0.0
    for number in range(1000):
        step = log.add(number, record(at, 0.01), at * 1.00005 + 0.01)  # 50 ppm
        at += 10.0
    assert step.received_at - step.ended_at < 0.001


def test_only_the_last_steps_are_kept() -> None:
    log = StepLog(max_steps=8)
    for number in range(100):
        log.add(number, record(number, 0.5), number + 0.5)
    assert [step.number for step in log.since(0.0)] == list(range(92, 100))
    assert [step.number for step in log.since(97.6)] == [98, 99]
    assert log.last_number == 99


def seen(number: int, began: float, ended: float, late_s: float = 0.0, **others: Any) -> SeenStep:
    return SeenStep(number, began, ended, ended + late_s, record(began, ended - began, **others))


@pytest.mark.parametrize(
    ("cause", "steps", "words"),
    [
        ("prefill", [seen(7, 0.0, 0.9, num_prefill_tokens=256)], "256 prompt tokens"),
        ("slow_step", [seen(7, 0.0, 0.9, announced_s=0.1)], "announced were 100 ms"),
        ("slow_step", [seen(7, 0.0, 0.9, announced_s=0.1, num_prefill_tokens=256)], "took 900 ms"),
        ("large_step", [seen(7, 0.0, 0.9, num_rows=31)], "31 rows"),
        ("late", [seen(7, 0.0, 0.1, late_s=0.9)], "900 ms after"),
        ("idle", [seen(7, 0.9, 1.0)], "ran for 100 ms"),
        ("idle", [], "no step"),
        ("not_scheduled", [seen(n, n / 10, (n + 1) / 10) for n in range(10)], "10 steps"),
    ],
)
def test_a_gap_of_a_second_is_put_down_to_what_most_of_it_went_into(
    cause: str, steps: list[SeenStep], words: str
) -> None:
    found = gap_cause(0.0, 1.0, steps)
    assert found.kind == cause and cause in GAP_CAUSES
    assert words in found.detail
