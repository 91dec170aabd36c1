"""Failure detection (C13): whether a replica still makes progress, on an injected clock."""

from __future__ import annotations

from serving.wire import Beat

MAX_SILENCE_S = 1.5
MIN_STEP_AGE_S = 1.5
STEP_COST_FACTOR = 3.0
MAX_LAG_S = 0.25


class Pulse:
    """The beats of one replica and the verdict on them."""

    def __init__(self, now: float) -> None:
        self.last_beat: Beat | None = None
        self._heard_at = now

    def beat(self, beat: Beat, now: float) -> None:
        self.last_beat = beat
        self._heard_at = now

    def restart(self, now: float) -> None:
        """This process itself stood still: silence up to `now` says nothing about the replica."""
        self._heard_at = now

    def age_s(self, now: float) -> float:
        """Seconds since the last beat, or since the window began."""
        return now - self._heard_at

    def stall(self, now: float) -> str | None:
        """Why the replica counts as stalled, None while it is well.

        The age of a step is judged by the newest beat alone: it is measured on the replica's clock. A
        replica that is still loading runs steps of unknown cost and has no rows.
        """
        silence_s = now - self._heard_at
        if silence_s > MAX_SILENCE_S:
            return f"no beat for {silence_s:.2f} s"
        beat = self.last_beat
        if beat is None or beat.state == "loading":
            return None
        if beat.step_age_s > max(MIN_STEP_AGE_S, STEP_COST_FACTOR * beat.announced_s):
            return f"step {beat.step} has run for {beat.step_age_s:.2f} s, announced {beat.announced_s:.2f} s"
        return None


class Lag:
    """Whether the gateway's own loop stood still between two ticks."""

    def __init__(self, now: float, tick_s: float) -> None:
        self.late_s = 0.0  # of the last tick
        self._tick_s = tick_s
        self._last = now

    def tick(self, now: float) -> bool:
        """True when this tick came more than `MAX_LAG_S` later than it should have."""
        self.late_s = max(now - self._last - self._tick_s, 0.0)
        self._last = now
        return self.late_s > MAX_LAG_S
