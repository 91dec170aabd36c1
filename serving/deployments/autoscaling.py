"""How many replicas there should be: a policy on predicted queue delay and KV headroom.

Pure: no ray, no input or output, well under a millisecond. Serve's controller runs it through
`serving/deployments/serve_policy.py`, `serving/sim` in simulated time (C18).

Replicas are added at once and removed late. What decides is what a choice that comes now would wait, at the time when
a replica asked for now could serve: a queue that will be gone by then is no reason to start one. The measured time to
start a replica is therefore in every prediction, and a longer one makes the policy slower to remove.

Sources: Little's law for the time that a row holds its slot; square-root staffing (Halfin and Whitt, Operations
Research 29(3), 1981) for the slots that a small fleet needs beyond its mean load.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from serving.deployments.rates import RowCounts, Window, WorkRates
from serving.errors import SettingsError

SHORTEST_WAIT_S: Final = 1.5
"""A need that only the trend shows must last so long; one that a queue shows counts at once."""
GIVE_UP_STARTS: Final = 5.0
MIN_GIVE_UP_S: Final = 900.0
"""A replica that takes longer than both is not loading: it finds no place, and may be given up."""
IN_MARGIN: Final = 0.8
"""Replicas go when the rest would be used to this share of the utilisation at which others come."""
NUM_STARTS: Final = 3
"""Latest start-up times kept; the longest counts."""

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "max_queue_delay_s": (0.05, 3600.0),
    "target_utilization": (0.1, 1.0),
    "kv_headroom": (0.0, 0.9),
    "scale_in_window_s": (1.0, 86400.0),
    "max_scale_in_share": (0.01, 0.5),
    "scale_to_zero_after_s": (1.0, 7 * 86400.0),
    "rows_per_replica": (1, 4096),
    "start_s": (0.1, 7200.0),
    "max_data_age_s": (1.0, 60.0),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """What the policy aims at. Raises SettingsError naming the key, its limits and the given value."""

    max_queue_delay_s: float = 2.0  # a predicted wait above it adds replicas
    target_utilization: float = 0.8  # share of slots that the steady load may take
    kv_headroom: float = 0.1  # share of KV blocks that stays free
    scale_in_window_s: float = 300.0  # how long fewer replicas must have been enough
    max_scale_in_share: float = 0.25  # of the replicas, removed at once; one may always go
    scale_to_zero_after_s: float = 600.0  # without any work; where min_replicas is 0
    rows_per_replica: int = 32  # until a replica has told
    start_s: float = 60.0  # from asking for a replica to its first token, until one has been measured
    max_data_age_s: float = 5.0  # older data count as missing

    def __post_init__(self) -> None:
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SettingsError(f"{key}: expected a number, not {value!r}")
            if not low <= value <= high:  # NaN, too
                raise SettingsError(f"{key}: {value:,} is outside {low:,} to {high:,}")

    @property
    def pause_s(self) -> float:
        """Between two removals."""
        return self.scale_in_window_s / 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What one running replica last told of itself."""

    id: str
    age_s: float  # since it was told, on the reader's own clock
    running: int  # rows
    waiting: int
    slots: int  # rows that it can run at once
    blocks_used: int
    blocks_total: int
    block_size: int  # tokens
    finished: int  # rows, since its start
    is_ready: bool = True  # False: draining
    start_s: float = 0.0  # that it took to load; 0 = unknown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What waits in all gateways together."""

    choices: int
    tokens: int
    age_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything that a decision may depend on."""

    now: float  # monotonic seconds
    num_target: int  # replicas asked for so far
    num_running: int  # of those, started
    min_replicas: int
    max_replicas: int
    replicas: tuple[ReplicaLoad, ...] = ()
    demand: Demand | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """num_replicas: what to ask for now. reason: one sentence for logs."""

    num_replicas: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Load:
    """The fleet's fresh data, added up."""

    num_ready: int
    running: int
    waiting: int  # in replicas and gateways
    slots: float  # of one replica, as far as its KV cache lets them be used
    kv_replicas: float  # that would hold the blocks of all rows with headroom
    queued_kv_replicas: float  # … and beside them, those of prompts that wait in gateways

    @property
    def outstanding(self) -> int:
        return self.running + self.waiting


class Autoscaler:
    """The policy of one deployment, with its memory. `decide` is called a few times a second.

    Its promises, whatever it observes: the bounds hold; without fresh data it holds; nothing is removed while a
    replica loads, nor more than `max_scale_in_share` within `pause_s` (or one replica, where the share is less).
    """

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings
        self._rates = WorkRates()
        self._needs: Window | None = None  # replicas that would have been enough
        self._starts: list[float] = []  # latest measured start-up times
        self._asked: list[float] = []  # when the replicas that load were asked for
        self._num_running = 0
        self._short_since: float | None = None  # when the trend first showed too few
        self._idle_since: float | None = None
        self._removed_at = -math.inf

    @property
    def start_s(self) -> float:
        """Seconds from asking for a replica until it runs, as last measured."""
        return max(self._starts, default=self._settings.start_s)

    def decide(self, seen: Observation) -> Decision:
        settings = self._settings
        bounded = min(max(seen.num_target, seen.min_replicas), seen.max_replicas)
        self._note_starts(seen)
        if bounded != seen.num_target:
            return self._change(seen, bounded, f"the bounds are {seen.min_replicas} to {seen.max_replicas}")
        if seen.num_running == 0:
            self._forget_window()
            asked = "asked for" if seen.num_target else "needed until somebody asks"
            return Decision(bounded, f"no replica runs and {bounded} are {asked}")
        fresh = [replica for replica in seen.replicas if replica.age_s <= settings.max_data_age_s]
        ready = [replica for replica in fresh if replica.is_ready]
        if 2 * len(fresh) <= seen.num_running or not ready:
            self._forget_window()
            return Decision(bounded, f"only {len(fresh)} of {seen.num_running} replicas have told their load: holding")
        demand = seen.demand if seen.demand is not None and seen.demand.age_s <= settings.max_data_age_s else None
        load = self._sum(ready, demand)
        self._rates.observe(
            seen.now,
            None if demand is None else demand.choices,
            {each.id: RowCounts(each.running, each.waiting, each.finished) for each in fresh},
            {each.id for each in seen.replicas},
        )
        self._starts = self._starts or [each.start_s for each in ready if each.start_s > 0.0][-NUM_STARTS:]
        wanted, reason = self._wanted(seen, load)
        if wanted > bounded:
            return self._change(seen, min(wanted, seen.max_replicas), reason)
        if len(fresh) < seen.num_running or demand is None:
            self._forget_window()
            missing = "what waits in gateways" if demand is None else "the load of every replica"
            return Decision(bounded, f"{missing} is not known: none is removed")
        return self._fewer(seen, load, bounded, reason)

    # --- what is there ----------------------------------------------------------------------------

    def _note_starts(self, seen: Observation) -> None:
        """Keeps the times at which loading replicas were asked for, and measures those that arrived."""
        num_loading = max(seen.num_target - seen.num_running, 0)
        for _ in range(max(seen.num_running - self._num_running, 0)):
            if self._asked:
                self._starts = [*self._starts, max(seen.now - self._asked.pop(0), 0.1)][-NUM_STARTS:]
        self._asked = self._asked[:num_loading]
        self._asked += [seen.now] * (num_loading - len(self._asked))
        self._num_running = seen.num_running

    def _loading(self, now: float) -> list[float]:
        """When the replicas were asked for that may still come."""
        give_up_s = max(GIVE_UP_STARTS * self.start_s, MIN_GIVE_UP_S)
        return [asked for asked in self._asked if now - asked <= give_up_s]

    def _sum(self, ready: list[ReplicaLoad], demand: Demand | None) -> _Load:
        settings = self._settings
        running = sum(replica.running for replica in ready)
        waiting = sum(replica.waiting for replica in ready) + (demand.choices if demand else 0)
        slots = sum(replica.slots or settings.rows_per_replica for replica in ready) / len(ready)
        blocks = sum(replica.blocks_used for replica in ready)
        room = sum(replica.blocks_total for replica in ready) / len(ready) * (1.0 - settings.kv_headroom)
        kv_replicas = queued_kv_replicas = 0.0
        if room > 0.0:
            if running and blocks:
                slots = max(min(slots, room * running / blocks), 1.0)
            kv_replicas = blocks / room
            queued_kv_replicas = (demand.tokens / max(ready[0].block_size, 1) if demand else 0.0) / room
        return _Load(len(ready), running, waiting, max(slots, 1.0), kv_replicas, queued_kv_replicas)

    # --- more -------------------------------------------------------------------------------------

    def _wanted(self, seen: Observation, load: _Load) -> tuple[int, str]:
        """(replicas that would do, why), before bounds; above the target only when more are needed."""
        settings, rates, target = self._settings, self._rates, seen.num_target
        if load.kv_replicas > target:
            return math.ceil(load.kv_replicas), (
                f"rows fill the KV caches of {load.kv_replicas:.1f} replicas, with {settings.kv_headroom:.0%} left free"
            )
        row_s = rates.row_s
        if row_s is None:
            there = f"{load.outstanding} choices are there for {target} x {load.slots:.0f} slots"
            if load.waiting and load.outstanding > target * load.slots:
                wanted = math.ceil(max(load.outstanding / load.slots, load.kv_replicas + load.queued_kv_replicas))
                return wanted, f"{there}, and too few have finished to tell how long they take"
            return 0, there
        arrivals = rates.arrivals_per_s(is_urgent=load.waiting > 0, ahead_s=self.start_s)
        wait_s, left = self._predict(seen, load, row_s, arrivals)
        facts = (
            f"{arrivals:.2g} choices come a second, a row takes {row_s:.2g} s, a replica has {load.slots:.0f} slots "
            f"and takes {self.start_s:.0f} s to start"
        )
        if load.waiting and wait_s > settings.max_queue_delay_s:
            drain_s = max(self.start_s, 30.0)
            slots = (arrivals + left / drain_s) * row_s
            wanted = math.ceil(slots / load.slots - 1e-9)
            if wanted > target:
                return wanted, f"a choice would wait {wait_s:.1f} s, above {settings.max_queue_delay_s:g} s: {facts}"
        steady = rates.steady_per_s(self.start_s)
        wanted = math.ceil(self._slots_for(steady * row_s, settings.target_utilization) / load.slots - 1e-9)
        if wanted <= target:
            self._short_since = None
            return wanted, facts
        self._short_since = seen.now if self._short_since is None else self._short_since
        if seen.now - self._short_since < SHORTEST_WAIT_S:
            return target, facts
        return wanted, f"the load will take {steady * row_s:.0f} slots: {facts}"

    def _predict(self, seen: Observation, load: _Load, row_s: float, arrivals: float) -> tuple[float, float]:
        """(wait in seconds, choices waiting) when a replica asked for now could serve, with those asked for so far."""
        horizon_s = self.start_s
        per_replica = load.slots / row_s  # rows that end in a second
        capacity = load.num_ready * per_replica * horizon_s
        for asked in self._loading(seen.now):
            remaining_s = min(max(asked + self.start_s - seen.now, 0.0), horizon_s)
            capacity += per_replica * (horizon_s - remaining_s)
        left = max(load.waiting + arrivals * horizon_s - capacity, 0.0)
        return left / (max(seen.num_target, 1) * per_replica), left

    @staticmethod
    def _slots_for(busy: float, utilization: float) -> float:
        """Slots under which `busy` of them on average leave few choices waiting."""
        return max(busy / utilization, busy + math.sqrt(busy))

    # --- fewer ------------------------------------------------------------------------------------

    def _fewer(self, seen: Observation, load: _Load, target: int, reason: str) -> Decision:
        settings, now = self._settings, seen.now
        if load.outstanding:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        window_s = max(settings.scale_in_window_s, 2.0 * self.start_s)
        if self._needs is None:
            self._needs = Window(now)
        busy = max(load.outstanding, self._rates.steady_per_s(self.start_s) * (self._rates.row_s or 0.0))
        slots = self._slots_for(busy, settings.target_utilization * IN_MARGIN)
        self._needs.add(now, max(slots / load.slots, load.kv_replicas / IN_MARGIN), window_s)
        if target == 1 and seen.min_replicas == 0:
            idle_s = 0.0 if self._idle_since is None else now - self._idle_since
            after_s = max(settings.scale_to_zero_after_s, 2.0 * self.start_s)
            if idle_s < after_s or self._loading(now):
                return Decision(target, f"idle for {idle_s:.0f} s of {after_s:.0f} s: {reason}")
            return self._change(seen, 0, f"nothing ran or waited for {idle_s:.0f} s")
        enough = max(math.ceil(self._needs.max - 1e-9), seen.min_replicas, 1)
        if enough >= target:
            return Decision(target, f"needed are {target}: {reason}")
        if self._loading(now):
            return Decision(target, f"{enough} would do, but {len(self._asked)} load")
        if self._needs.covers_s(now) < window_s:
            return Decision(
                target, f"{enough} would do, for {self._needs.covers_s(now):.0f} s of {window_s:.0f} s so far"
            )
        if now - self._removed_at < settings.pause_s:
            return Decision(target, f"{enough} would do; the last removal was {now - self._removed_at:.0f} s ago")
        remove = min(target - enough, max(int(settings.max_scale_in_share * target), 1))
        return self._change(seen, target - remove, f"{enough} would have been enough for {window_s:.0f} s: {reason}")

    # --- memory -----------------------------------------------------------------------------------

    def _change(self, seen: Observation, num_replicas: int, reason: str) -> Decision:
        if num_replicas < seen.num_target:
            self._removed_at = seen.now
        else:
            self._forget_window()
        self._short_since = None
        return Decision(num_replicas, f"{seen.num_target} -> {num_replicas}: {reason}")

    def _forget_window(self) -> None:
        """What was not seen whole is no reason to remove anything."""
        self._needs = None
        self._idle_since = None
