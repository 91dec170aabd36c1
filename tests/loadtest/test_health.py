"""A generator that does not keep up says which bound it broke."""

from __future__ import annotations

import time

import gevent
import pytest

from loadtest.health import Health, complaints, percentile, worst
from loadtest.plan import Limits
from loadtest.record import GeneratorHealth


def test_percentiles_are_values_that_somebody_had() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([], 50) == 0


def test_a_loop_that_is_held_and_a_core_that_is_full_are_seen() -> None:
    health = Health(window_s=0.3)
    watch = gevent.spawn(health.watch)
    gevent.sleep(0.05)
    before = time.process_time()
    while time.process_time() - before < 0.5:
        until = time.process_time() + 0.06
        while time.process_time() < until:
            pass
        gevent.sleep(0)
    gevent.sleep(0.02)
    watch.kill()
    state = health.state()
    assert state.loop_lag_p99_s > 0.04
    assert len(complaints(state, Limits(max_cpu=0.01))) == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_intended": 5, "num_sent": 3}, "2 of 5 requests were not sent"),
        ({"send_lag_p99_s": 0.03}, "left late: 99th percentile 30.0 ms, limit 25 ms"),
        ({"loop_lag_p99_s": 0.03}, "woke late: 99th percentile 30.0 ms, limit 25 ms"),
        ({"cpu_fraction": 0.95}, "95 % of its core, limit 90 %"),
    ],
)
def test_each_bound_has_its_words(fields: dict[str, float], reason: str) -> None:
    (found,) = complaints(GeneratorHealth(**fields), Limits())
    assert reason in found
    assert complaints(GeneratorHealth(), Limits()) == []


def test_the_worst_worker_speaks_for_all() -> None:
    one = GeneratorHealth(num_sent=3, send_lag_p99_s=0.01, cpu_fraction=0.9)
    two = GeneratorHealth(num_sent=4, send_lag_p99_s=0.02, cpu_fraction=0.1)
    whole = worst([one, two])
    assert (whole.num_sent, whole.send_lag_p99_s, whole.cpu_fraction) == (7, 0.02, 0.9)
