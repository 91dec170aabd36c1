"""Everything that one scrape shows, read at one moment."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from serving.metrics.histogram import LAG_SECONDS, Histogram
from serving.metrics.series import ModelSeries
from serving.types import ReplicaStats
from serving.wire import Beat


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaView:
    """A connected replica as its beats describe it."""

    id: str
    model: str
    beat: Beat
    beat_age_s: float
    stats: ReplicaStats | None  # None = it is of a version that sends none


@dataclasses.dataclass(frozen=True, slots=True)
class PlaneView:
    """The data plane at one moment."""

    models: tuple[str, ...] = ()  # that have been served, by name
    replicas: tuple[ReplicaView, ...] = ()  # one per id, the longest connected first
    replica_states: Mapping[str, int] = dataclasses.field(default_factory=dict)
    queued: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # by model: choices, tokens
    links_ended: Mapping[str, int] = dataclasses.field(default_factory=dict)
    faults: Mapping[str, int] = dataclasses.field(default_factory=dict)
    loop_lag: Histogram = dataclasses.field(default_factory=lambda: Histogram(LAG_SECONDS))


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What the feeds of the catalogue read. replicas: those of the plane that are shown."""

    responses: Counter[tuple[str, str]]
    errors: Counter[str]
    sheds: Counter[str]
    num_connections: int
    num_spans_dropped: int
    models: dict[str, ModelSeries]
    plane: PlaneView
    replicas: tuple[ReplicaView, ...]
