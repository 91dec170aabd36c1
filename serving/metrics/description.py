"""What a metric and its labels are. `catalogue` has all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from serving.metrics.histogram import Histogram
from serving.metrics.snapshot import Snapshot

OTHER = "other"
"""Label value of whatever is beyond a label's bound."""

Kind = Literal["counter", "gauge", "histogram"]
Value = float | Histogram
Feed = Callable[[Snapshot], Iterable[tuple[tuple[str, ...], Value]]]
"""(label values in the order of the metric's labels, value) of everything that is known now."""


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """A label and all that it may say: `values`, or at most `max_values` that are not known beforehand."""

    name: str
    help: str
    values: tuple[str, ...] = ()
    max_values: int = 0

    @property
    def bound(self) -> int:
        """How many values it may have."""
        return len(self.values) or self.max_values

    def of(self, counts: Mapping[str, float]) -> Iterable[tuple[tuple[str], float]]:
        """Every one of the closed values with its count, 0 where there is none: a rate has a beginning."""
        unknown = sum(count for value, count in counts.items() if value not in self.values)
        for value in self.values:
            yield (value,), counts.get(value, 0) + (unknown if value == OTHER else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """One family of series."""

    name: str  # as # TYPE has it; a counter's series end in _total
    kind: Kind
    unit: str
    help: str
    feed: Feed
    source: str  # where it is counted, for readers of the documentation
    labels: tuple[Label, ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """Names under which Prometheus stores it."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)
