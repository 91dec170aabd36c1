"""The search for the knee, on servers whose knee is known from a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loadtest.goodput import Objective
from loadtest.knee import Knee, SearchSettings, Trial, find_knee
from loadtest.summary import Summary
from tests.loadtest.records import run_through, served_in_turn

OBJECTIVE = Objective(ttft_s=0.5)


class Server:
    """One server in simulated time; what the search did to it."""

    def __init__(self, serve: Callable[[float], Summary]) -> None:
        self.serve, self.rates, self.rests, self.now = serve, list[float](), list[float](), 0.0

    def run(self, rate: float) -> Summary:
        self.rates.append(rate)
        self.now += 10.0
        return self.serve(rate)

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds

    def search(self, **settings: Any) -> Knee:
        return find_knee(self.run, SearchSettings(**settings), sleep=self.rest, clock=lambda: self.now)


def steady(capacity: float, num: int = 4000) -> Callable[[float], Summary]:
    """Constant arrivals, constant service: keeps the objective up to its capacity and hardly beyond."""

    def serve(rate: float) -> Summary:
        arrivals = np.arange(num) / rate
        return run_through(arrivals, served_in_turn(arrivals, np.full(num, 1 / capacity)), OBJECTIVE)

    return serve


def holds_to(limit: float, valid_to: float = math.inf) -> Callable[[float], Summary]:
    """Keeps the objective up to a rate exactly."""

    def serve(rate: float) -> Summary:
        sojourn = 0.1 if rate <= limit else 1.0
        return run_through(np.arange(10) / rate, np.full(10, sojourn), OBJECTIVE, is_valid=rate <= valid_to)

    return serve


@pytest.mark.parametrize("capacity", [2.3, 17.0, 130.0])
def test_a_known_capacity_is_found_within_five_percent(capacity: float) -> None:
    knee = Server(steady(capacity)).search(precision=0.02)
    assert knee.reason == "found"
    assert knee.rate == pytest.approx(capacity, rel=0.05)
    assert knee.rate < knee.broken_at <= knee.rate * 1.02
    assert len(knee.trials) < 20


def test_a_random_queue_has_the_knee_that_theory_gives() -> None:
    """M/M/1: the sojourn is exponential with rate mu - lambda, so 95 % are within t up to lambda = mu - ln(20) / t."""
    capacity, num, random = 40.0, 20_000, np.random.default_rng(1)

    def serve(rate: float) -> Summary:
        arrivals = np.cumsum(random.exponential(1 / rate, num))
        return run_through(arrivals, served_in_turn(arrivals, random.exponential(1 / capacity, num)), OBJECTIVE)

    knee = Server(serve).search(start_rate=20, precision=0.03, min_share=0.95)
    assert knee.rate == pytest.approx(capacity - math.log(20) / 0.5, rel=0.05)


def test_it_starts_too_high_and_comes_down() -> None:
    knee = Server(holds_to(3.0)).search(start_rate=100.0, precision=0.05)
    assert knee.rate <= 3.0 <= knee.broken_at <= knee.rate * 1.05


def test_the_majority_of_runs_decides() -> None:
    """A server with a hiccup in every third run: one run a rate is fooled, three are not."""
    num_runs = 0

    def serve(rate: float) -> Summary:
        nonlocal num_runs
        num_runs += 1
        return holds_to(8.0)(1e9 if num_runs % 3 == 0 else rate)

    knee = Server(serve).search(repeats=3, precision=0.1)
    assert knee.rate <= 8.0 <= knee.broken_at <= knee.rate * 1.1
    num_runs = 0
    assert Server(serve).search(repeats=1, precision=0.1).rate < 4.5


def test_runs_rest_in_between_and_longer_after_a_break() -> None:
    server = Server(holds_to(3.0))
    knee = server.search(start_rate=2.0, cool_down_s=1.5, precision=1.0)
    assert server.rates == [2.0, 4.0]
    assert [trial.has_held for trial in knee.trials] == [True, False]
    assert server.rests == [1.5]
    server = Server(holds_to(0.6))
    server.search(start_rate=2.0, cool_down_s=1.5, precision=1.0)
    assert server.rates == [2.0, 1.0, 0.5] and server.rests == [3.0, 3.0]


def test_a_generator_that_cannot_keep_up_is_said_to_be_the_limit() -> None:
    knee = Server(holds_to(1e6, valid_to=20.0)).search(precision=0.05)
    assert knee.reason == "generator"
    assert knee.rate <= 20.0 <= knee.broken_at
    assert all(trial.summary.is_valid for trial in knee.curve())
    assert len(knee.curve()) < len(knee.trials)


@pytest.mark.parametrize(
    ("limit", "settings", "reason"),
    [
        (1e6, {"max_rate": 50.0}, "max_rate"),
        (0.0, {"min_rate": 0.1}, "min_rate"),
        (1e6, {"max_runs": 3}, "max_runs"),
        (1e6, {"max_s": 25.0}, "max_s"),
    ],
)
def test_it_stops_by_a_rule_and_says_which(limit: float, settings: dict[str, Any], reason: str) -> None:
    server = Server(holds_to(limit))
    knee = server.search(**settings)
    assert knee.reason == reason
    assert len(server.rates) <= 10
    assert max(server.rates) <= 50.0
    assert knee.rate == (max(server.rates) if limit else 0.0)


def test_each_trial_is_told_as_it_ends() -> None:
    told: list[Trial] = []
    knee = find_knee(holds_to(5.0), SearchSettings(), on_trial=told.append, sleep=lambda seconds: None)
    assert tuple(told) == knee.trials
    rates = [trial.rate for trial in knee.curve()]
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"start_rate": 0.0}, "start_rate"),
        ({"max_rate": 0.5}, "max_rate"),
        ({"min_share": 1.5}, "min_share"),
        ({"precision": 0.0}, "precision"),
        ({"repeats": 2}, "repeats must be odd"),
        ({"max_runs": 0}, "max_runs"),
    ],
)
def test_settings_name_what_is_wrong(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        SearchSettings(**wrong)
