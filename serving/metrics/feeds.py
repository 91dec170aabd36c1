"""From one snapshot to label values and numbers: what the tables of metrics are fed by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from serving.metrics import labels
from serving.metrics.description import OTHER, Feed, Label, Value
from serving.metrics.series import ModelSeries
from serving.metrics.snapshot import ReplicaView, Snapshot
from serving.types import ReplicaStats


def one(read: Callable[[Snapshot], Value]) -> Feed:
    return lambda snapshot: [((), read(snapshot))]


def by_model(read: Callable[[ModelSeries], Value]) -> Feed:
    return lambda snapshot: [((name,), read(series)) for name, series in snapshot.models.items()]


def by_model_and(label: Label, read: Callable[[ModelSeries], dict[str, int]]) -> Feed:
    return lambda snapshot: [
        ((name, *value), count) for name, series in snapshot.models.items() for value, count in label.of(read(series))
    ]


def queued(index: int) -> Feed:
    def feed(snapshot: Snapshot) -> Iterable[tuple[tuple[str, ...], float]]:
        totals = dict.fromkeys(snapshot.models, 0)
        for model, waiting in snapshot.plane.queued.items():
            name = model if model in totals else OTHER
            totals[name] = totals.get(name, 0) + waiting[index]
        return [((name,), total) for name, total in totals.items()]

    return feed


def kv_usage(snapshot: Snapshot) -> Iterable[tuple[tuple[str, ...], float]]:
    blocks: dict[str, tuple[int, int]] = {}
    for view in snapshot.plane.replicas:
        name = view.model if view.model in snapshot.models else OTHER
        used, total = blocks.get(name, (0, 0))
        blocks[name] = used + view.beat.blocks_used, total + view.beat.blocks_total
    return [((name,), used / total) for name, (used, total) in blocks.items() if total]


def by_replica(read: Callable[[ReplicaView], float]) -> Feed:
    return lambda snapshot: [((view.id,), read(view)) for view in snapshot.replicas]


def by_stats(read: Callable[[ReplicaStats], Value | None]) -> Feed:
    """Nothing of a replica that does not know."""
    return lambda snapshot: [
        ((view.id,), value)
        for view in snapshot.replicas
        if view.stats is not None and (value := read(view.stats)) is not None
    ]


def ranks(snapshot: Snapshot) -> Iterable[tuple[tuple[str, ...], float]]:
    return [
        ((view.id, str(rank.rank)), rank.age_s + view.beat_age_s)
        for view in snapshot.replicas
        for rank in view.beat.ranks[: labels.MAX_RANKS]
    ]


def phases(snapshot: Snapshot) -> Iterable[tuple[tuple[str, ...], float]]:
    return [
        ((view.id, *phase), seconds)
        for view in snapshot.replicas
        if view.stats is not None
        for phase, seconds in labels.PHASE.of(dict(view.stats.phases))
    ]
