"""The simulated day: nobody is lost, the engine's arithmetic holds, and the policy is worth what it costs."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from loadtest.bench.autoscaling import cost
from serving.deployments.autoscaling import Autoscaler, ScalingSettings
from serving.gateway.streams import Choice, Request
from serving.gateway.ticket import Job, Ticket
from serving.sim.day import CARD, Day, Outcome, Service
from serving.sim.oracle import oracle
from serving.sim.replica import Engine, Replica
from serving.sim.scalers import Fixed, OngoingRequests, Scaler
from serving.sim.trace import DAY_S, Trace, day
from serving.types import SamplingParams

HOURS_S = 4 * 3600.0
SETTINGS = ScalingSettings(start_s=60.0, rows_per_replica=8)


def ticket(order: int, prompt: int, output: int) -> Ticket:
    request = Request(id="", created=0, card=CARD, deadline=float("inf"))
    choice = Choice(0, request, bytes(4 * prompt), SamplingParams(max_tokens=output))
    return Ticket(choice, Job(request), order, 0, 0.0, float("inf"))


def run(trace: Trace, scaler: Scaler, *, service: Service | None = None, first: int = 1) -> Outcome:
    return Day(trace, service or Service(), scaler, first=first).run()


def test_a_lone_row_takes_what_its_tokens_take() -> None:
    engine = Engine()
    replica = Replica(engine, 0.0, 0.0)
    replica.take(ticket(0, 400, 100), 100, 10.0)
    end = replica.next_end()
    assert end == pytest.approx(10.0 + 400 / engine.prefill_per_s + 100 * (engine.step_s + engine.row_s), rel=0.01)


def test_rows_slow_each_other_and_tokens_are_conserved() -> None:
    """Whatever comes and goes: the steps that a replica has made are the integral of its speed."""
    rng = random.Random(1)
    replica, now, ended = Replica(Engine(), 0.0, 0.0), 0.0, 0
    for order in itertools.count():
        now += rng.expovariate(2.0)
        while (end := replica.next_end()) is not None and end <= now:
            assert replica.end_first(end).order < order
            ended += 1
        if ended == 100:
            break
        if replica.has_room(40):
            replica.take(ticket(order, 64, 50), 50, now)
        assert replica.num_rows <= 8
        assert replica.blocks_used == 8 * replica.num_rows


def test_a_row_that_moves_goes_on_where_it_was() -> None:
    replica = Replica(Engine(), 0.0, 0.0)
    replica.take(ticket(0, 16, 1000), 1000, 0.0)
    [(_, made)] = replica.stop(10.0)
    assert made == pytest.approx(10.0 / 0.0215, abs=3)


def test_the_trace_is_seeded_and_follows_the_day() -> None:
    one, same, other = day(1), day(1), day(2)
    assert one == same and one.arrivals != other.arrivals
    by_hour = [0] * 24
    for arrival in one.arrivals:
        by_hour[int(arrival.at / 3600.0)] += 1
    assert one.duration_s == DAY_S
    assert max(by_hour[13:18]) > 3 * min(by_hour[1:6])
    assert sum(each.output for each in one.arrivals) / len(one.arrivals) == pytest.approx(315, rel=0.1)


def test_without_capacity_problems_nobody_waits_and_with_them_everybody_is_served() -> None:
    trace = day(3, duration_s=HOURS_S)
    many = run(trace, Fixed(20), first=20)
    assert many.attainment > 0.999 and many.replica_hours == pytest.approx(80.0, rel=0.01)
    few = run(trace, Fixed(1), service=Service(max_replicas=1))
    assert few.attainment < 0.9 and few.num_lost == 0
    assert len(few.waits) == len(trace.arrivals) and min(few.waits) >= 0.0


def test_deaths_lose_nobody() -> None:
    trace = day(4, duration_s=HOURS_S, num_failures=200)
    outcome = run(trace, Autoscaler(SETTINGS))
    assert outcome.num_lost == 0 and min(outcome.waits) >= 0.0


def test_the_policy_beats_what_it_replaces() -> None:
    """Four hours of the day: as much on time for less than the ongoing-requests policy in both of its tunings, and
    within a factor of two of the oracle."""
    whole, begin = day(1, peak_per_s=1.4), 10 * 3600.0
    afternoon = Trace(
        [
            dataclasses.replace(each, at=each.at - begin)
            for each in whole.arrivals
            if begin <= each.at < begin + HOURS_S
        ],
        [(at - begin, pick) for at, pick in whole.failures if begin <= at < begin + HOURS_S],
        HOURS_S,
    )
    quickly = OngoingRequests(6.4, look_back_s=5.0, up_delay_s=0.0, down_delay_s=300.0)
    ours = cost(run(afternoon, Autoscaler(SETTINGS), first=3), 60.0)
    slow = cost(run(afternoon, OngoingRequests(6.4), first=3), 60.0)
    quick = cost(run(afternoon, quickly, first=3), 60.0)
    best = cost(oracle(afternoon, Service()), 60.0)
    assert ours < min(slow, quick), (ours, slow, quick)
    assert best <= ours < 2.0 * best, (ours, best)
