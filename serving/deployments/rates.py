"""What the autoscaling policy measures over time: arrivals, row times, and how many replicas would have done. Pure."""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

FAST_S: Final = 4.0
MEDIUM_S: Final = 60.0
SLOW_S: Final = 300.0
"""Time constants of the arrival rate: of a step, of the steady load, of its trend."""
SECOND_S: Final = 1.0
"""A step must have lasted for two of these before it is believed: a single burst is gone by then."""
LASTS_ON: Final = 5.0
ROW_S: Final = 120.0
"""Time constant of the row time."""
MIN_FINISHED: Final = 8.0
"""Rows that must have finished lately before their mean time is believed."""
MAX_TREND: Final = 1.5
"""A trend may raise the steady load by this factor at most."""
MAX_GAP_S: Final = 30.0
"""A longer time without observations begins anew."""
NUM_BUCKETS: Final = 30
_ROUNDING_S: Final = 1e-6


class Average:
    """Events per second, exponentially weighted; unbiased from the start (the weights are summed as well)."""

    def __init__(self, time_constant_s: float) -> None:
        self._time_constant_s = time_constant_s
        self._events = 0.0
        self.seen_s = 0.0  # weight of the time behind it

    def add(self, events: float, elapsed_s: float) -> None:
        keep = math.exp(-elapsed_s / self._time_constant_s)
        weight_s = self._time_constant_s * (1.0 - keep)
        self._events = self._events * keep + events * weight_s / elapsed_s  # as if spread evenly over the time
        self.seen_s = self.seen_s * keep + weight_s

    @property
    def per_s(self) -> float:
        return max(self._events / self.seen_s, 0.0) if self.seen_s > 0.0 else 0.0


class RowCounts(NamedTuple):
    """Of one replica."""

    running: int
    waiting: int
    finished: int  # since its start


class WorkRates:
    """Arrivals and row times of one deployment, from counts alone.

    What came = what ended + what is there more than before. The mean time that a row holds its slot is the time that
    slots were held over the rows that passed through them (Little's law); those that began and those that ended count
    half each, for while a load rises the former are too many and the latter too few.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._at: float | None = None
        self._queued: int | None = None
        self._rows: dict[str, RowCounts] = {}
        self._fast, self._medium, self._slow = Average(FAST_S), Average(MEDIUM_S), Average(SLOW_S)
        self._arrived: collections.deque[tuple[float, float]] = collections.deque()  # (when, so many so far)
        self._surge_since: float | None = None
        self._held_s = 0.0
        self._num_began = 0.0
        self._num_finished = 0.0

    def observe(self, now: float, queued: int | None, rows: Mapping[str, RowCounts], there: Collection[str]) -> None:
        """queued: choices that wait in gateways; None = not known. rows: by replica, of those that told.

        there: the names of all replicas: one that did not tell counts as it last did, so that its silence neither ends
        its rows nor makes them new.
        """
        if self._at is not None and not 0.0 <= now - self._at <= MAX_GAP_S:
            self._begin()
        known = {name: self._rows[name] for name in there if name in self._rows} | dict(rows)
        num_finished = sum(max(row.finished - self._rows.get(name, row).finished, 0) for name, row in rows.items())
        running = sum(row.running for row in known.values())
        more_running = running - sum(row.running for row in self._rows.values())
        more = (
            more_running + sum(row.waiting for row in known.values()) - sum(row.waiting for row in self._rows.values())
        )
        if queued is not None and self._queued is not None:
            more += queued - self._queued
        self._rows = known
        self._queued = self._queued if queued is None else queued
        if self._at is not None and now > self._at:
            elapsed_s = now - self._at
            for average in (self._fast, self._medium, self._slow):
                average.add(more + num_finished, elapsed_s)
            self._note_arrivals(now, more + num_finished)
            keep = math.exp(-elapsed_s / ROW_S)
            self._held_s = self._held_s * keep + running * elapsed_s
            self._num_began = self._num_began * keep + num_finished + more_running
            self._num_finished = self._num_finished * keep + num_finished
        self._at = now

    def _note_arrivals(self, now: float, arrived: float) -> None:
        self._arrived.append((now, (self._arrived[-1][1] if self._arrived else 0.0) + arrived))
        while len(self._arrived) > 1 and self._arrived[1][0] <= now - 2.0 * SECOND_S + _ROUNDING_S:
            self._arrived.popleft()
        if min(self._fast.per_s, self._lasting_per_s(now)) <= self._medium.per_s:
            self._surge_since = None
        elif self._surge_since is None:
            self._surge_since = now - 2.0 * SECOND_S

    def _lasting_per_s(self, now: float) -> float:
        """The smaller rate of the last two seconds."""
        if not self._arrived:
            return 0.0
        between = now - SECOND_S + _ROUNDING_S
        first, last = self._arrived[0][1], self._arrived[-1][1]
        middle = next((count for at, count in reversed(self._arrived) if at <= between), first)
        return min(last - middle, middle - first) / SECOND_S

    @property
    def row_s(self) -> float | None:
        """Mean seconds that a row holds its slot; None until enough rows have ended."""
        if self._num_finished < MIN_FINISHED:
            return None
        return 2.0 * self._held_s / (self._num_finished + max(self._num_began, 0.0))

    def steady_per_s(self, ahead_s: float) -> float:
        """Choices that come in a second, `ahead_s` from now: the steady rate and its rise, not its fall."""
        now_per_s = self._medium.per_s
        if self._slow.seen_s < 0.6 * SLOW_S:
            return now_per_s
        # An exponential average lags a ramp by its time constant.
        rise = (now_per_s - self._slow.per_s) / (SLOW_S - MEDIUM_S)
        return min(max(now_per_s + rise * (MEDIUM_S + ahead_s), now_per_s), MAX_TREND * now_per_s)

    def arrivals_per_s(self, *, is_urgent: bool, ahead_s: float) -> float:
        """Mean rate of the next `ahead_s`.

        is_urgent: something waits, so that the last seconds count if they brought more than usual. What has lasted so
        long is expected to last LASTS_ON times as long again, and no longer: most bursts are short.
        """
        steady = self.steady_per_s(ahead_s)
        if self._surge_since is None or self._at is None or not is_urgent:
            return steady
        lasting = min(self._fast.per_s, self._lasting_per_s(self._at))
        ahead = min(LASTS_ON * (self._at - self._surge_since) / ahead_s, 1.0)
        return steady + max(lasting - steady, 0.0) * ahead


class Window:
    """The largest of what was added in the last so many seconds, within a thirtieth of them; bounded."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._buckets: collections.deque[tuple[int, float]] = collections.deque(maxlen=NUM_BUCKETS + 2)
        self._length_s = 0.0

    def add(self, now: float, value: float, length_s: float) -> None:
        width_s = length_s / NUM_BUCKETS
        if length_s != self._length_s:  # the buckets have another width now: their values are all that is kept
            highest = max((value for _, value in self._buckets), default=value)
            self._buckets.clear()
            self._buckets.append((int(now / width_s), highest))
            self._length_s = length_s
        bucket = int(now / width_s)
        if self._buckets and self._buckets[-1][0] == bucket:
            self._buckets[-1] = bucket, max(self._buckets[-1][1], value)
        else:
            self._buckets.append((bucket, value))
        while self._buckets[0][0] < bucket - NUM_BUCKETS:
            self._buckets.popleft()

    @property
    def max(self) -> float:
        return max(value for _, value in self._buckets)

    def covers_s(self, now: float) -> float:
        """Seconds since the first value."""
        return now - self._since
