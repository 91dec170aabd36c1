"""The gateway's queue (C22): choices of one fingerprint that wait for a permit.

Order: choices that already ran somewhere (resumed) first, in order of arrival; then by priority; then
the lane's own rule, which is first come first served. Every operation costs the same at any depth.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from serving.errors import NoCapacity
from serving.gateway.ticket import Ticket

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 30.0
RATE_WINDOW_S = 10.0


class Lane(Protocol):
    """The order among waiting tickets of one priority: where fair queueing between tenants goes."""

    def __len__(self) -> int: ...
    def push(self, ticket: Ticket) -> None: ...
    def pop(self) -> Ticket: ...
    def discard(self, ticket: Ticket) -> None: ...
    def position(self, ticket: Ticket) -> int: ...


class Fifo:
    """First come, first served; O(1) for everything."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()
        self._num_popped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, ticket: Ticket) -> None:
        ticket.ahead = len(self._waiting)
        ticket.mark = self._num_popped
        self._waiting[ticket] = None

    def pop(self) -> Ticket:
        ticket, _ = self._waiting.popitem(last=False)
        self._num_popped += 1
        return ticket

    def discard(self, ticket: Ticket) -> None:
        del self._waiting[ticket]

    def position(self, ticket: Ticket) -> int:
        """Tickets ahead; too high by those that were ahead and left without being served."""
        return min(ticket.ahead - (self._num_popped - ticket.mark), len(self._waiting) - 1)


class DrainRate:
    """Choices per second that leave the queue while there is one, over about the last `window_s` of such time.

    Time without a backlog does not count: it measures the clients, not the capacity.
    """

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._busy_s = 0.0
        self._count = 0.0
        self._last: float | None = None

    def observe(self, now: float, had_backlog: bool, num_left: int) -> None:
        """Something joined or left: `num_left` that had waited, after a time with or without a backlog."""
        if had_backlog and self._last is not None and now > self._last:
            elapsed = now - self._last
            keep = math.exp(-elapsed / self._window_s)
            self._busy_s = self._busy_s * keep + elapsed
            self._count *= keep
        self._count += num_left
        self._last = now

    def per_s(self) -> float | None:
        """None until something that had waited has left."""
        if self._count <= 0.0 or self._busy_s <= 0.0:
            return None
        return self._count / self._busy_s


class Queue:
    """Waiting choices of one fingerprint, bounded."""

    def __init__(
        self,
        max_len: int,
        *,
        unknown_wait_s: float = MAX_RETRY_AFTER_S,
        lane: Callable[[], Lane] = Fifo,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """unknown_wait_s: the wait to announce while nothing has been measured. jitter: uniform in [0, 1)."""
        self.max_len = max_len
        self.rate = DrainRate()
        self._unknown_wait_s = unknown_wait_s
        self._lane = lane
        self._jitter = jitter
        self.num_tokens = 0  # prompts and journals of those that wait
        self._len = 0
        self._tokens_of: dict[int, int] = {}  # likewise, of each priority; of those that go first under _FIRST
        self._first: list[Ticket] = []  # latest arrival first: the next to go is the last element
        self._lanes: dict[int, Lane] = {}
        self._priorities: list[int] = []  # of the lanes that are not empty, lowest first

    def __len__(self) -> int:
        return self._len

    def check_room(self, num_choices: int, num_permits: int = 0) -> None:
        """Raises NoCapacity when `num_choices` more would not fit, beyond those that can start now."""
        if self._len + num_choices - num_permits <= self.max_len:
            return
        wait_s = self.wait_s(self._len) * (0.75 + 0.5 * self._jitter())
        raise NoCapacity(
            f"The queue is full: {self._len} of {self.max_len} choices are waiting and this request has {num_choices}.",
            retry_after_s=min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
            reason="saturated",
        )

    def push(self, ticket: Ticket, now: float) -> None:
        """Never refuses: the bound is for newcomers (`check_room`), not for what has to be resumed."""
        self.rate.observe(now, self._len > 0, 0)
        self._count(ticket, 1)
        if ticket.goes_first:
            insort(self._first, ticket, key=_latest_first)
            return
        lane = self._lanes.get(ticket.priority)
        if lane is None:
            lane = self._lanes[ticket.priority] = self._lane()
            insort(self._priorities, ticket.priority)
        lane.push(ticket)

    def pop(self, now: float) -> Ticket:
        """The next to run. Raises IndexError when nothing waits."""
        if self._first:
            ticket = self._first.pop()
        else:
            priority = self._priorities[-1]
            lane = self._lanes[priority]
            ticket = lane.pop()
            if not len(lane):
                del self._lanes[priority]
                self._priorities.pop()
        self.rate.observe(now, True, 1 if now > ticket.enqueued_at else 0)
        self._count(ticket, -1)
        return ticket

    def discard(self, ticket: Ticket, now: float) -> None:
        """A waiting ticket leaves without being served. Raises KeyError when it does not wait here."""
        if ticket.goes_first:
            at = bisect_left(self._first, -ticket.order, key=_latest_first)
            if at == len(self._first) or self._first[at] is not ticket:
                raise KeyError(ticket.order)
            del self._first[at]
        else:
            lane = self._lanes[ticket.priority]
            lane.discard(ticket)
            if not len(lane):
                del self._lanes[ticket.priority]
                del self._priorities[bisect_left(self._priorities, ticket.priority)]
        self.rate.observe(now, True, 0)
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, change: int) -> None:
        self._len += change
        num_tokens = change * ticket.num_tokens
        self.num_tokens += num_tokens
        rank = _FIRST if ticket.goes_first else ticket.priority
        left = self._tokens_of.get(rank, 0) + num_tokens
        if left:
            self._tokens_of[rank] = left
        else:
            self._tokens_of.pop(rank, None)
        ticket.is_queued = change > 0

    def position(self, ticket: Ticket) -> int:
        """1 = the next to run. An upper bound when others ahead have left without being served."""
        if ticket.goes_first:
            at = bisect_left(self._first, -ticket.order, key=_latest_first)
            return len(self._first) - at
        ahead = len(self._first)
        for priority in reversed(self._priorities):
            if priority == ticket.priority:
                break
            ahead += len(self._lanes[priority])
        return ahead + self._lanes[ticket.priority].position(ticket) + 1

    def tokens_ahead(self, ticket: Ticket) -> int:
        """Prompts and journals of those that wait with at least its priority, itself not counted, when it joins."""
        own = _FIRST if ticket.goes_first else ticket.priority
        return sum(count for rank, count in self._tokens_of.items() if rank >= own) - ticket.num_tokens

    def wait_s(self, position: int) -> float:
        """Predicted seconds until the ticket at `position` starts."""
        per_s = self.rate.per_s()
        return self._unknown_wait_s if per_s is None else position / per_s


_FIRST = 1 << 62  # above every priority


def _latest_first(ticket: Ticket) -> int:
    return -ticket.order
