"""Deadlines of all unfinished choices, without a scan: a wheel of buckets on an injected clock (C14, C18)."""

from __future__ import annotations

import heapq
import math

from serving.gateway.ticket import Ticket

TICK_S = 0.02


class Deadlines:
    """Tickets in buckets by the time at which they expire. O(1) to add and to remove, exactly.

    A bucket is due when its whole tick has passed: nothing expires early, and at most one tick late. A
    ticket whose `expires` was moved forward meanwhile is put into its new bucket when the old one is due.
    """

    def __init__(self, tick_s: float = TICK_S) -> None:
        self._tick_s = tick_s
        self._buckets: dict[int, dict[Ticket, None]] = {}
        self._numbers: list[int] = []  # heap of the keys of _buckets

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def add(self, ticket: Ticket) -> None:
        if ticket.expires == math.inf:
            ticket.bucket = -1
            return
        number = int(ticket.expires // self._tick_s)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            heapq.heappush(self._numbers, number)
        bucket[ticket] = None
        ticket.bucket = number

    def discard(self, ticket: Ticket) -> None:
        """The ticket will not expire. Its bucket stays until it is due: their number is bounded by time."""
        bucket = self._buckets.get(ticket.bucket)
        if bucket is not None:
            bucket.pop(ticket, None)

    def move(self, ticket: Ticket, expires: float) -> None:
        """A later time costs nothing now; an earlier one moves the ticket."""
        is_earlier = expires < ticket.expires
        ticket.expires = expires
        if is_earlier:
            self.discard(ticket)
            self.add(ticket)

    def due(self, now: float) -> list[Ticket]:
        """Removes and returns the tickets that have expired, earliest tick first."""
        expired = []
        while self._numbers and (self._numbers[0] + 1) * self._tick_s <= now:
            number = heapq.heappop(self._numbers)
            for ticket in self._buckets.pop(number):
                if ticket.expires != math.inf and int(ticket.expires // self._tick_s) <= number:
                    expired.append(ticket)
                else:
                    self.add(ticket)
        return expired
