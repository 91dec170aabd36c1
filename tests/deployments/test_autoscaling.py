"""The autoscaling policy: its promises over 50,000 random steps, and what it does in the situations it is made for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
import time
from collections import deque

import pytest

from serving.deployments.autoscaling import (
    SHORTEST_WAIT_S,
    Autoscaler,
    Decision,
    Demand,
    Observation,
    ReplicaLoad,
    ScalingSettings,
)
from serving.errors import SettingsError

SLOTS = 8
SETTINGS = ScalingSettings(scale_in_window_s=60.0, scale_to_zero_after_s=120.0, start_s=10.0, rows_per_replica=SLOTS)


class Fleet:
    """Replicas that take rows for a fixed time, in steps of a second. What it tells is exact unless a test lies."""

    def __init__(self, num: int, *, start_s: float = 10.0, row_s: float = 4.0, low: int = 1, high: int = 20) -> None:
        self.now = 1000.0
        self.target = num
        self.start_s = start_s
        self.row_s = row_s
        self.low, self.high = low, high
        self.rows: dict[str, list[float]] = {f"r{at}": [] for at in range(num)}  # when each ends
        self.finished = dict.fromkeys(self.rows, 0)
        self.loading: list[float] = []  # when each will serve
        self.queued = 0
        self._carry = 0.0
        self._number = num
        self.demand_age_s: float | None = 0.0
        self.silent: dict[str, float] = {}  # replica -> age of its data

    def seen(self) -> Observation:
        demand = None
        if self.demand_age_s is not None:
            demand = Demand(choices=self.queued, tokens=self.queued * 64, age_s=self.demand_age_s)
        return Observation(
            now=self.now,
            num_target=self.target,
            num_running=len(self.rows),
            min_replicas=self.low,
            max_replicas=self.high,
            replicas=tuple(
                ReplicaLoad(
                    id=name,
                    age_s=self.silent.get(name, 0.5),
                    running=len(rows),
                    waiting=0,
                    slots=SLOTS,
                    blocks_used=len(rows) * 4,
                    blocks_total=SLOTS * 16,
                    block_size=16,
                    finished=self.finished[name],
                )
                for name, rows in self.rows.items()
            ),
            demand=demand,
        )

    def apply(self, decision: Decision) -> None:
        self.target = decision.num_replicas
        while len(self.rows) + len(self.loading) < self.target:
            self.loading.append(self.now + self.start_s)
        while len(self.rows) + len(self.loading) > self.target:
            if self.loading:
                self.loading.pop()  # as Serve does: what does not run goes first
            else:
                self.queued += len(self.rows.popitem()[1])

    def kill(self, name: str) -> None:
        self.queued += len(self.rows.pop(name))
        self.loading.append(self.now + self.start_s)

    def step(self, arrivals_per_s: float, seconds: float = 1.0) -> None:
        self.now += seconds
        for ready in [at for at in self.loading if at <= self.now]:
            self.loading.remove(ready)
            self._number += 1
            self.rows[f"r{self._number}"] = []
            self.finished[f"r{self._number}"] = 0
        for name, rows in self.rows.items():
            left = [end for end in rows if end > self.now]
            self.finished[name] += len(rows) - len(left)
            self.rows[name] = left
        self._carry += arrivals_per_s * seconds
        self.queued += int(self._carry)
        self._carry -= int(self._carry)
        for rows in sorted(self.rows.values(), key=len):
            while self.queued and len(rows) < SLOTS:
                self.queued -= 1
                rows.append(self.now + self.row_s)


def run(fleet: Fleet, policy: Autoscaler, arrivals_per_s: float, seconds: float) -> list[Decision]:
    decisions = []
    for _ in range(round(seconds)):
        fleet.step(arrivals_per_s)
        decisions.append(policy.decide(fleet.seen()))
        fleet.apply(decisions[-1])
    return decisions


# --- promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_promises_hold_over_random_steps(seed: int) -> None:
    """10,000 steps each: load that jumps, replicas that die, load slowly, fall silent; gateways that fall silent;
    time that stands still or jumps."""
    rng = random.Random(seed)
    settings = dataclasses.replace(SETTINGS, max_scale_in_share=rng.choice([0.1, 0.25, 0.5]), start_s=5.0)
    policy = Autoscaler(settings)
    low = rng.choice([0, 1, 3])
    fleet = Fleet(max(low, 1), start_s=rng.choice([2.0, 30.0]), row_s=rng.choice([1.0, 6.0]), low=low)
    rate = 0.0
    removals: deque[tuple[float, int, int]] = deque()  # when, from, how many
    changes: list[tuple[float, int]] = []
    for _ in range(10_000):
        if rng.random() < 0.01:
            rate = rng.choice([0.0, 0.0, 0.5, 2.0, 5.0, 20.0, 60.0])
        if rng.random() < 0.01:
            fleet.start_s = rng.choice([2.0, 30.0, 120.0])
        if rng.random() < 0.02 and fleet.rows:
            fleet.kill(rng.choice(list(fleet.rows)))
        if rng.random() < 0.02 and fleet.rows:
            fleet.silent[rng.choice(list(fleet.rows))] = rng.choice([0.0, 4.9, 5.1, 60.0, math.inf])
        if rng.random() < 0.05:
            fleet.silent.clear()
        fleet.demand_age_s = rng.choice([0.0, 1.0, 4.0, 6.0, None]) if rng.random() < 0.03 else 0.5
        fleet.step(rate, rng.choice([0.1, 1.0, 1.0, 1.0, 5.0]))
        seen = fleet.seen()
        decision = policy.decide(seen)
        now, before, after = fleet.now, fleet.target, decision.num_replicas

        assert low <= after <= fleet.high
        assert decision.reason and "\n" not in decision.reason
        if not seen.replicas and low <= before:
            assert after == before, "nothing runs: Serve's cold start and nobody else starts the first"
        is_fresh = [each.age_s <= settings.max_data_age_s for each in seen.replicas]
        has_demand = seen.demand is not None and seen.demand.age_s <= settings.max_data_age_s
        if 2 * sum(is_fresh) <= len(is_fresh):
            assert after == before, "acted on stale data"
        if after < before:
            assert all(is_fresh) and has_demand, "removed without knowing everything"
            assert not fleet.loading, "removed while a replica loads"
            assert before - after <= max(int(settings.max_scale_in_share * before), 1)
            assert after > 0 or (low == 0 and before == 1 and seen.replicas[0].running == 0 and fleet.queued == 0)
            assert not removals or now - removals[-1][0] >= settings.pause_s or after == 0, "removed twice in one pause"
            removals.append((now, before, before - after))
            changes.append((now, -1))
        elif after > before:
            changes.append((now, 1))
        if low:
            assert after >= low
        fleet.apply(decision)
    assert len(removals) > 5 and any(direction > 0 for _, direction in changes), "the walk reached both directions"


def test_a_decision_costs_far_less_than_a_millisecond() -> None:
    fleet = Fleet(64, high=128)
    policy = Autoscaler(SETTINGS)
    times = []
    for _ in range(300):
        fleet.step(100.0)
        seen = fleet.seen()
        begun = time.perf_counter()
        policy.decide(seen)
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 0.001, f"{statistics.median(times) * 1e6:.0f} us for 64 replicas"


def test_steady_load_with_noise_does_not_flap() -> None:
    """Random arrivals, 12 slots busy on average: once it has found its size, two hours change little."""
    rng = random.Random(3)
    fleet, policy = Fleet(1), Autoscaler(SETTINGS)
    sizes = []
    for _ in range(7200):
        arrivals = sum(1 for _ in range(30) if rng.random() < 0.1)
        fleet.step(float(arrivals))
        fleet.apply(policy.decide(fleet.seen()))
        sizes.append(fleet.target)
    settled = sizes[900:]
    turns = sum(before != after for before, after in itertools.pairwise(settled))
    assert turns <= 8, f"{turns} changes under a steady load: {sorted(set(settled))}"
    assert statistics.mean(settled) <= 4.0, "12 busy slots of 8 a replica"


# --- more ---------------------------------------------------------------------------------------


def test_a_step_in_load_is_answered_within_three_seconds() -> None:
    fleet, policy = Fleet(2), Autoscaler(SETTINGS)
    run(fleet, policy, 1.0, 300)
    assert fleet.target == 2 or fleet.target == 1
    before = fleet.target
    decisions = run(fleet, policy, 20.0, 3)
    assert max(decision.num_replicas for decision in decisions) > before
    assert "would wait" in next(d.reason for d in decisions if d.num_replicas > before)
    run(fleet, policy, 20.0, 60)
    assert 10 <= fleet.target <= 16, "80 busy slots of 8 a replica, and a margin"


def test_a_burst_that_will_be_gone_before_a_replica_could_serve_starts_none() -> None:
    fleet = Fleet(2, start_s=120.0, row_s=2.0, low=2)
    policy = Autoscaler(dataclasses.replace(SETTINGS, start_s=120.0))
    run(fleet, policy, 2.0, 400)
    fleet.queued += 40  # five seconds of work for two replicas
    decisions = run(fleet, policy, 2.0, 20)
    assert {decision.num_replicas for decision in decisions} == {2}


def test_replicas_on_their_way_count() -> None:
    """While replicas load, the queue that they will serve asks for no more of them."""
    fleet, policy = Fleet(1, start_s=30.0), Autoscaler(dataclasses.replace(SETTINGS, start_s=30.0))
    run(fleet, policy, 1.0, 120)
    run(fleet, policy, 8.0, 60)
    assert 4 <= fleet.target <= 9, "32 slots and a margin, and what it takes to work off half a minute's queue"


def test_before_anything_has_finished_every_choice_gets_a_slot() -> None:
    fleet, policy = Fleet(1, row_s=1000.0), Autoscaler(SETTINGS)
    fleet.queued = 30
    decisions = run(fleet, policy, 0.0, 2)
    assert decisions[-1].num_replicas == 4, "30 choices, 8 slots a replica"


def test_a_rising_load_is_met_before_it_arrives() -> None:
    """A ramp over 40 minutes with a start-up of two minutes: the queue stays short all the way."""
    fleet = Fleet(2, start_s=120.0)
    policy = Autoscaler(dataclasses.replace(SETTINGS, start_s=120.0))
    worst = 0
    for second in range(2400):
        fleet.step(1.0 + 15.0 * second / 2400)
        fleet.apply(policy.decide(fleet.seen()))
        worst = max(worst, fleet.queued)
    assert worst <= 2 * SLOTS, f"{worst} choices waited"


def test_a_need_that_only_the_trend_shows_must_last() -> None:
    fleet, policy = Fleet(3, low=3), Autoscaler(SETTINGS)
    run(fleet, policy, 2.0, 200)
    since, queued = math.inf, 0
    while (decision := policy.decide(fleet.seen())).num_replicas == 3:
        since = min(since, math.inf if policy._short_since is None else policy._short_since)
        queued += fleet.queued
        fleet.step(5.0, 0.5)
        assert fleet.now < 2000.0, "20 busy slots of 24 are too many"
    assert queued == 0 and "will take" in decision.reason
    assert fleet.now - since >= SHORTEST_WAIT_S


def test_a_full_kv_cache_counts_though_slots_are_free() -> None:
    replica = ReplicaLoad(
        id="a",
        age_s=0.0,
        running=3,
        waiting=0,
        slots=32,
        blocks_used=96,
        blocks_total=100,
        block_size=16,
        finished=0,
    )
    seen = Observation(
        now=1.0, num_target=1, num_running=1, min_replicas=1, max_replicas=4, replicas=(replica,), demand=None
    )
    decision = Autoscaler(SETTINGS).decide(seen)
    assert decision.num_replicas == 2 and "KV" in decision.reason


# --- fewer --------------------------------------------------------------------------------------


def test_replicas_go_late_and_a_few_at_a_time() -> None:
    fleet, policy = Fleet(12), Autoscaler(SETTINGS)
    run(fleet, policy, 16.0, 200)
    high = fleet.target
    decisions = run(fleet, policy, 1.0, 900)
    sizes = [high, *(decision.num_replicas for decision in decisions)]
    first = next(at for at, size in enumerate(sizes) if size < high)
    assert first >= SETTINGS.scale_in_window_s, "a load that falls is watched first"
    assert sizes[-1] <= 2
    for before, after in itertools.pairwise(sizes):
        assert before - after <= max(before // 4, 1)


def test_a_slow_start_makes_it_slower_to_remove() -> None:
    fleet = Fleet(4, start_s=300.0)
    policy = Autoscaler(dataclasses.replace(SETTINGS, start_s=300.0))
    decisions = run(fleet, policy, 0.5, 650)
    first = next(at for at, decision in enumerate(decisions) if decision.num_replicas < 4)
    assert first >= 600, "twice the start-up time"


def test_it_falls_to_zero_after_idle_time_and_not_while_something_waits() -> None:
    fleet, policy = Fleet(1, low=0), Autoscaler(SETTINGS)
    run(fleet, policy, 1.0, 60)
    decisions = run(fleet, policy, 0.0, 110)
    assert fleet.target == 1
    decisions = run(fleet, policy, 0.0, 30)
    assert fleet.target == 0 and "1 -> 0" in next(d.reason for d in decisions if d.num_replicas == 0)


def test_it_never_falls_to_zero_while_gateways_are_not_heard() -> None:
    fleet, policy = Fleet(1, low=0), Autoscaler(SETTINGS)
    fleet.demand_age_s = None
    decisions = run(fleet, policy, 0.0, 1000)
    assert fleet.target == 1 and "not known" in decisions[-1].reason


def test_a_replica_that_finds_no_place_does_not_hold_the_others_for_ever() -> None:
    fleet, policy = Fleet(1), Autoscaler(SETTINGS)
    run(fleet, policy, 1.0, 30)
    fleet.start_s = math.inf
    run(fleet, policy, 10.0, 30)
    assert fleet.target > 2 and len(fleet.rows) == 1
    fleet.queued = 0
    run(fleet, policy, 0.5, 600)
    assert fleet.target > 2, "it may still come"
    run(fleet, policy, 0.5, 1200)
    assert fleet.target <= 2


def test_changed_bounds_are_obeyed_at_once() -> None:
    fleet, policy = Fleet(4), Autoscaler(SETTINGS)
    fleet.high = 2
    decision = policy.decide(fleet.seen())
    assert decision.num_replicas == 2 and "bounds are 1 to 2" in decision.reason


def test_the_start_up_time_is_measured() -> None:
    fleet, policy = Fleet(1, start_s=42.0), Autoscaler(SETTINGS)
    run(fleet, policy, 1.0, 30)
    assert policy.start_s == SETTINGS.start_s
    run(fleet, policy, 10.0, 60)
    assert policy.start_s == pytest.approx(42.0, abs=1.5)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_queue_delay_s": 0}, "max_queue_delay_s: 0 is outside 0.05 to 3,600.0"),
        ({"max_scale_in_share": 0.51}, "max_scale_in_share: 0.51 is outside 0.01 to 0.5"),
        ({"target_utilization": float("nan")}, "target_utilization: nan is outside 0.1 to 1.0"),
        ({"start_s": "soon"}, "start_s: expected a number, not 'soon'"),
        ({"rows_per_replica": True}, "rows_per_replica: expected a number, not True"),
    ],
)
def test_bad_settings_are_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ScalingSettings(**given)  # type: ignore[arg-type]
