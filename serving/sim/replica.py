"""A replica in simulated time: rows share its steps, so that each is slower the more there are."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from typing import Final

from serving.gateway.ticket import Ticket

BLOCK: Final = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What one replica can do."""

    slots: int = 8
    blocks: int = 640
    step_s: float = 0.02  # of a step without rows
    row_s: float = 0.0015  # … and of every row in it
    prefill_per_s: float = 4000.0  # tokens

    def full_row_s(self, prompt: int, output: int) -> float:
        """How long a row holds its slot where all others are taken."""
        return prompt / self.prefill_per_s + output * (self.step_s + self.slots * self.row_s)


class Replica:
    """Running rows by the number of steps after which each ends: steps pass at one speed for all of them."""

    _numbers = itertools.count()

    def __init__(self, engine: Engine, now: float, asked_at: float) -> None:
        self.name = f"replica-{next(self._numbers)}"
        self.engine = engine
        self.start_s = now - asked_at
        self.finished = 0
        self.blocks_used = 0
        self._at = now
        self._steps = 0.0
        self._ends: list[tuple[float, int, Ticket]] = []
        self.rows: dict[int, float] = {}  # order of a ticket -> steps at which its first token came

    @property
    def step_s(self) -> float:
        return self.engine.step_s + len(self._ends) * self.engine.row_s

    def has_room(self, num_blocks: int) -> bool:
        return len(self._ends) < self.engine.slots and self.blocks_used + num_blocks <= self.engine.blocks

    def advance(self, now: float) -> None:
        """Let the steps up to `now` pass; none of them ends a row (see `next_end`)."""
        self._steps += (now - self._at) / self.step_s
        self._at = now

    def take(self, ticket: Ticket, left: int, now: float) -> None:
        """left: tokens that it has yet to make; its prompt and journal are computed first."""
        self.advance(now)
        prefill_steps = ticket.num_tokens / self.engine.prefill_per_s / self.step_s
        self.blocks_used += blocks_of(ticket)
        self.rows[ticket.order] = self._steps + prefill_steps
        heapq.heappush(self._ends, (self._steps + prefill_steps + left, ticket.order, ticket))

    def next_end(self) -> float | None:
        """When the next row ends, if none comes or goes before."""
        if not self._ends:
            return None
        return self._at + max(self._ends[0][0] - self._steps, 0.0) * self.step_s

    def end_first(self, now: float) -> Ticket:
        """The row whose end has come."""
        self.advance(now)
        _, _, ticket = heapq.heappop(self._ends)
        del self.rows[ticket.order]
        self.blocks_used -= blocks_of(ticket)
        self.finished += 1
        return ticket

    def stop(self, now: float) -> list[tuple[Ticket, int]]:
        """It is gone: its rows, each with the tokens that it had made here."""
        self.advance(now)
        rows = [(ticket, max(int(self._steps - self.rows[order]), 0)) for _, order, ticket in self._ends]
        self._ends.clear()
        self.rows.clear()
        self.blocks_used = 0
        return rows

    @property
    def num_rows(self) -> int:
        return len(self._ends)


def blocks_of(ticket: Ticket) -> int:
    """KV blocks of the whole row: preemption is not simulated."""
    return -(-(ticket.num_prompt_tokens + ticket.choice.sampling.max_tokens) // BLOCK)
