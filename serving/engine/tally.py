"""What a replica has counted since its start: the numbers behind its series on /metrics (C17)."""

from __future__ import annotations

import math

from serving.metrics.histogram import RATIOS, STEP_SECONDS, Histogram

WINDOW_S = 5.0
"""Of work, over which the fraction of the hardware's limit is averaged."""


class Tally:
    """Written by the step loop's thread alone; any thread may read."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.num_preemptions = 0
        self.prefix_queried = 0  # tokens of rows at their first admission
        self.prefix_hits = 0  # those found in the prefix cache
        self.step_seconds = Histogram(STEP_SECONDS)
        self.prediction = Histogram(RATIOS)  # duration over announced cost
        self.limit_busy_s = 0.0  # of steps whose ideal cost is known
        self.ideal_s = 0.0
        self._recent_busy_s = 0.0
        self._recent_ideal_s = 0.0

    def admitted(self, num_tokens: int, num_cached: int) -> None:
        self.prefix_queried += num_tokens
        self.prefix_hits += num_cached

    def stepped(
        self, duration_s: float, announced_s: float, ideal_s: float, num_prefill_tokens: int, num_decode_tokens: int
    ) -> None:
        """ideal_s: NaN where the hardware's limit is not known."""
        self.num_steps += 1
        self.prefill_tokens += num_prefill_tokens
        self.decode_tokens += num_decode_tokens
        self.step_seconds.observe(duration_s)
        self.prediction.observe(duration_s / announced_s)
        if ideal_s == ideal_s:
            keep = math.exp(-duration_s / WINDOW_S)
            self.limit_busy_s += duration_s
            self.ideal_s += ideal_s
            self._recent_busy_s = self._recent_busy_s * keep + duration_s
            self._recent_ideal_s = self._recent_ideal_s * keep + ideal_s

    @property
    def hardware_fraction(self) -> float | None:
        """Ideal over actual duration of the last WINDOW_S of work; None before any is known."""
        return self._recent_ideal_s / self._recent_busy_s if self._recent_busy_s > 0.0 else None
