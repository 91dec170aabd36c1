"""Two runs side by side: what got better, what got worse, and what cannot be told.

Each metric has a change, an interval for it, and a verdict. The interval is from a bootstrap over requests, seeded:
blocks of consecutive requests are drawn with replacement (about n^(1/3) requests each, because neighbours wait in the
same queue and are no independent witnesses), the metric is taken of each draw of A and of B, and the interval holds
99 % of the changes. A change counts when it is at least the threshold and its interval excludes no change; one that is
that large with an interval that does not exclude it is called unclear. The interval knows these two runs alone: what
would differ between two runs of the same server on another day, it cannot see.

Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993), ch. 8; H. Künsch, The Jackknife and the
Bootstrap for General Stationary Observations, Ann. Statist. 17 (1989).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np

from loadtest.goodput import Objective, within
from loadtest.record import RunHeader
from loadtest.summary import Group, Summary, summarize
from loadtest.table import Floats, Ints, Recorded, Table

COMPARISON_VERSION = 1
NUM_DRAWS = 1000
MAX_BLOCKS = 512
CONFIDENCE = 0.99
_EDGES = np.geomspace(1e-6, 1e4, 2301)  # seconds: bins 1 % wide

Verdict = Literal["better", "worse", "same", "unclear"]
EXIT_SAME, EXIT_WORSE, EXIT_WRONG_INPUT, EXIT_INVALID = 0, 1, 2, 3


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of A and B."""

    metric: str
    unit: Literal["s", "1/s", "share"]
    is_higher_better: bool
    a: float
    b: float
    change: float
    """Relative, B / A - 1; of a share the difference B - A. NaN where one has no value."""
    low: float
    high: float
    """The interval for `change`."""
    verdict: Verdict


class RunComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Names as in the JSON, which stay."""

    comparison_version: int = COMPARISON_VERSION
    threshold: float
    """Relative change that matters."""
    share_threshold: float
    """Difference between shares that matters."""
    confidence: float = CONFIDENCE
    changes: list[Change]
    differences: list[str]
    """Settings in which the runs differ, so that their figures may not be comparable."""
    invalid: list[str]
    """Why A or B is not to be trusted."""
    a: Summary
    b: Summary

    @property
    def exit_code(self) -> int:
        """3: a run is invalid; 1: something is worse; 0: nothing is shown to be worse."""
        if self.invalid:
            return EXIT_INVALID
        return EXIT_WORSE if any(change.verdict == "worse" for change in self.changes) else EXIT_SAME


def compare(
    a: Recorded,
    b: Recorded,
    objective: Objective,
    *,
    threshold: float = 0.05,
    share_threshold: float = 0.01,
    seed: int = 0,
) -> RunComparison:
    """B against A. Raises ValueError for thresholds outside 0 … 1."""
    for name, value in (("threshold", threshold), ("share_threshold", share_threshold)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {value:g}")
    first, second = summarize(a, objective), summarize(b, objective)
    generator = np.random.default_rng(seed)
    draws = [_Draws(run.table, objective, summary.duration_s, generator) for run, summary in ((a, first), (b, second))]
    changes = []
    for metric in _metrics(first.all, second.all):
        drawn_a, drawn_b = (draw.of(metric.name) for draw in draws)
        limit = share_threshold if metric.unit == "share" else threshold
        changes.append(_judged(metric, drawn_a, drawn_b, limit))
    changes += _correctness(first, second)
    return RunComparison(
        threshold=threshold,
        share_threshold=share_threshold,
        changes=changes,
        differences=_differences(a.header, b.header),
        invalid=[f"{name}: {reason}" for name, run in (("A", a), ("B", b)) for reason in run.reasons],
        a=first,
        b=second,
    )


# --- metrics ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Metric:
    name: str
    unit: Literal["s", "1/s", "share"]
    is_higher_better: bool
    a: float
    b: float


_LATENCIES = {
    "ttft": ("ttft_s", (50, 90, 99)),
    "itl": ("itl_s", (50, 90, 99)),
    "max_gap": ("max_gap_s", (50, 99)),
    "tpot": ("tpot_s", (50, 99)),
    "e2e": ("e2e_s", (50, 99)),
}


def _metrics(a: Group, b: Group) -> Iterator[_Metric]:
    yield _Metric("goodput_share", "share", True, a.goodput_share, b.goodput_share)
    yield _Metric("error_share", "share", False, _error_share(a), _error_share(b))
    yield _Metric("goodput_per_s", "1/s", True, a.goodput_per_s, b.goodput_per_s)
    yield _Metric("output_tokens_per_s", "1/s", True, a.output_tokens_per_s, b.output_tokens_per_s)
    for name, (field, percentiles) in _LATENCIES.items():
        for percentile in percentiles:
            values = [getattr(getattr(group, field), f"p{percentile}") for group in (a, b)]
            yield _Metric(f"{name}_p{percentile}_s", "s", False, *values)


def _error_share(group: Group) -> float:
    return sum(group.errors.values()) / group.num_offered if group.num_offered else math.nan


def _correctness(a: Summary, b: Summary) -> list[Change]:
    """Answers that differed when sent again: no threshold, a server that never erred and now does is worse."""
    if not (a.correctness.num_compared and b.correctness.num_compared):
        return []
    wrong = [1 - run.correctness.num_equal / run.correctness.num_compared for run in (a, b)]
    difference = wrong[1] - wrong[0]
    verdict: Verdict = "same" if difference == 0 else "worse" if difference > 0 else "better"
    return [
        Change(
            metric="unequal_share",
            unit="share",
            is_higher_better=False,
            a=wrong[0],
            b=wrong[1],
            change=difference,
            low=difference,
            high=difference,
            verdict=verdict,
        )
    ]


# --- the bootstrap ---------------------------------------------------------------------------


class _Draws:
    """`NUM_DRAWS` draws of a run's blocks, and every metric of each draw."""

    def __init__(self, table: Table, objective: Objective, duration_s: float, generator: np.random.Generator) -> None:
        self.num = len(table)
        if not self.num:
            return
        length = max(round(self.num ** (1 / 3)), -(-self.num // MAX_BLOCKS))
        self.block: Ints = np.arange(self.num) // length
        self.num_blocks = int(self.block[-1]) + 1
        even = np.full(self.num_blocks, 1 / self.num_blocks)
        self.counts = generator.multinomial(self.num_blocks, even, NUM_DRAWS).astype(np.float64)
        self.table, self.is_good, self.duration_s = table, within(table, objective), duration_s
        self.bins: dict[str, tuple[int, Floats]] = {}

    def of(self, metric: str) -> Floats:
        """[NUM_DRAWS] the metric in each draw; NaN where a draw has no value."""
        if not self.num:
            return np.full(NUM_DRAWS, np.nan)
        match metric:
            case "goodput_share":
                return self._sum(self.is_good) / self._sum(np.ones(self.num))
            case "error_share":
                return self._sum(~self.table.is_ok) / self._sum(np.ones(self.num))
            case "goodput_per_s":
                return self._per_s(self.is_good)
            case "output_tokens_per_s":
                return self._per_s(self.table.output_tokens)
        name, percentile, _ = metric.rsplit("_", 2)
        return self._quantile(name, int(percentile[1:]) / 100)

    def _sum(self, values: Floats | Ints | np.typing.NDArray[np.bool_]) -> Floats:
        return np.asarray(self.counts @ np.bincount(self.block, values, self.num_blocks), dtype=np.float64)

    def _per_s(self, values: Floats | Ints | np.typing.NDArray[np.bool_]) -> Floats:
        """Over the time that the drawn blocks took, each from its first request's due time to the next block's."""
        firsts = self.table.intended_s[np.flatnonzero(np.diff(self.block, prepend=-1))]
        spans = np.diff(firsts, append=self.table.intended_s[0] + self.duration_s)
        lengths = self.counts @ spans
        found = np.full(NUM_DRAWS, np.nan)
        np.divide(self._sum(values), lengths, out=found, where=lengths > 0)
        return found

    def _quantile(self, name: str, share: float) -> Floats:
        if name not in self.bins:
            first, histogram = self._histogram(name)
            self.bins[name] = first, np.cumsum(self.counts @ histogram, axis=1)
        first, cumulated = self.bins[name]
        total = cumulated[:, -1:]
        place = first + (cumulated < np.ceil(total * share - 1e-9)).sum(axis=1)
        found = np.sqrt(_EDGES[:-1] * _EDGES[1:])[np.minimum(place, len(_EDGES) - 2)]
        return np.where(total[:, 0] > 0, found, np.nan)

    def _histogram(self, name: str) -> tuple[int, Floats]:
        """The first bin that holds anything, and [num_blocks, bins] from it to the last that does."""
        table, block = self.table, self.block
        if name == "itl":
            is_ok = table.is_ok[table.gap_owner]
            values, block = table.gap_s[is_ok], block[table.gap_owner[is_ok]]
        else:
            values = getattr(table, f"{name}_s")
            block, values = block[~np.isnan(values)], values[~np.isnan(values)]
        place = np.clip(np.searchsorted(_EDGES, values, side="right") - 1, 0, len(_EDGES) - 2)
        first = int(place.min()) if len(place) else 0
        num_bins = int(place.max()) + 1 - first if len(place) else 1
        place -= first
        flat = np.bincount(block * num_bins + place, minlength=self.num_blocks * num_bins)
        return first, flat.reshape(self.num_blocks, num_bins).astype(np.float64)


def _judged(metric: _Metric, drawn_a: Floats, drawn_b: Floats, threshold: float) -> Change:
    if metric.unit == "share":
        change, drawn = metric.b - metric.a, drawn_b - drawn_a
    else:
        change = metric.b / metric.a - 1 if metric.a else math.nan if metric.b else 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = drawn_b / drawn_a - 1
    drawn = drawn[np.isfinite(drawn)]
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [outside, 1 - outside]) if len(drawn) else (math.nan, math.nan)
    # The draws know a latency to within a bin, the change is exact: the interval holds it.
    low, high = (float(np.fmin(low, change)), float(np.fmax(high, change)))
    return Change(
        metric=metric.name,
        unit=metric.unit,
        is_higher_better=metric.is_higher_better,
        a=metric.a,
        b=metric.b,
        change=change,
        low=low,
        high=high,
        verdict=_verdict(metric, change, low, high, threshold),
    )


def _verdict(metric: _Metric, change: float, low: float, high: float, threshold: float) -> Verdict:
    if math.isnan(metric.a) and math.isnan(metric.b):
        return "same"
    if math.isnan(change):
        return "unclear"
    if change == 0 or abs(change) < threshold:
        return "same"
    if low <= 0 <= high:
        return "unclear"
    return "better" if (change > 0) == metric.is_higher_better else "worse"


def _differences(a: RunHeader, b: RunHeader) -> list[str]:
    """Settings that decide what was asked of the server, where they differ."""
    found = []
    for name in ("model", "seed", "mode", "arrivals", "workload", "prompt_lengths", "num_workers"):
        first, second = getattr(a, name), getattr(b, name)
        if first != second:
            found.append(f"{name}: {_short(first)} and {_short(second)}")
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:159] + "…"
