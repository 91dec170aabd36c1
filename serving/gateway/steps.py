"""The last steps of one replica, as its frames told them (C17), and what they say of a gap between two tokens."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from serving.types import StepRecord

MAX_STEPS = 1024
DRIFT_S = 1e-4
"""Per second: how far two monotonic clocks may part, so that one lucky frame of long ago does not count for ever."""
SLOW = 2.0
"""Times its announced cost: a step that took longer was held up."""


@dataclasses.dataclass(frozen=True, slots=True)
class SeenStep:
    """A step, on the gateway's clock."""

    number: int
    started_at: float
    ended_at: float
    received_at: float
    record: StepRecord


class StepLog:
    """Bounded. Only steps that concerned this gateway are told to it."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._steps: deque[SeenStep] = deque(maxlen=max_steps)
        self.last_number = -1
        self._offset_s: float | None = None  # of the clocks: the least that a frame was ever late by

    def add(self, number: int, record: StepRecord, received_at: float) -> SeenStep:
        """One completed step whose frame has just arrived."""
        late_s = received_at - (record.started_s + record.duration_s)
        if self._offset_s is not None:
            late_s = min(late_s, self._offset_s + DRIFT_S * (received_at - self._steps[-1].received_at))
        self._offset_s = late_s
        started_at = record.started_s + late_s
        step = SeenStep(number, started_at, started_at + record.duration_s, received_at, record)
        self._steps.append(step)
        self.last_number = number
        return step

    def since(self, at: float) -> list[SeenStep]:
        """Steps that ended after `at`, oldest first."""
        found = []
        for step in reversed(self._steps):
            if step.ended_at <= at:
                break
            found.append(step)
        return found[::-1]


@dataclasses.dataclass(frozen=True, slots=True)
class GapCause:
    """Why two tokens stood apart. kind: a word of `choice_life.GAP_CAUSES`; detail: the same in a sentence."""

    kind: str
    detail: str


def gap_cause(since: float, until: float, steps: Sequence[SeenStep]) -> GapCause:
    """What most of the time from `since` to `until` went into.

    steps: those of the row's replica that ended after `since`.
    """
    gap_s = until - since
    if not steps:
        return GapCause("idle", "the replica completed no step that this gateway heard of")
    last = steps[-1]
    late_s = last.received_at - last.ended_at
    if late_s > gap_s / 2:
        return GapCause("late", f"the frame of step {last.number} was read {_ms(late_s)} after the step had ended")
    longest = max(steps, key=lambda step: step.record.duration_s)
    took_s = min(longest.record.duration_s, longest.ended_at - since)
    if took_s <= gap_s / 2:
        if len(steps) > 1 and sum(step.record.duration_s for step in steps) > gap_s / 2:
            return GapCause("not_scheduled", f"{len(steps)} steps ran for other requests")
        return GapCause("idle", f"the replica's step loop ran for {_ms(took_s)} of it")
    record = longest.record
    if record.duration_s > SLOW * record.announced_s:
        said = f"step {longest.number} took {_ms(record.duration_s)}; announced were {_ms(record.announced_s)}"
        return GapCause("slow_step", said)
    if record.num_prefill_tokens:  # of others: a row that decodes computes one token
        num_tokens, took = record.num_prefill_tokens, _ms(record.duration_s)
        return GapCause("prefill", f"step {longest.number} computed {num_tokens} prompt tokens of others in {took}")
    said = f"step {longest.number} of {record.num_rows} rows took {_ms(record.duration_s)}, as announced"
    return GapCause("large_step", said)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
