"""A page whose every number is known."""

from __future__ import annotations

import dataclasses

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics.catalogue import BY_NAME
from serving.metrics.histogram import LAG_SECONDS, RATIOS, STEP_SECONDS, Histogram
from serving.metrics.page import Metrics
from serving.metrics.snapshot import PlaneView, ReplicaView
from serving.types import RankState, ReplicaStats
from serving.wire import Beat

Samples = dict[tuple[str, ...], float]


@dataclasses.dataclass
class Passage:
    queued_at: float | None = None
    started_at: float | None = None


def stats(steps: int = 7) -> ReplicaStats:
    step_seconds, ratios = Histogram(STEP_SECONDS), Histogram(RATIOS)
    for _ in range(steps):
        step_seconds.observe(0.01)
        ratios.observe(0.75)
    return ReplicaStats(
        steps=steps,
        prefill_tokens=100,
        decode_tokens=50,
        preemptions=3,
        prefix_queried=96,
        prefix_hits=32,
        blocks_evicted=5,
        step_counts=step_seconds.counts,
        step_sum=step_seconds.sum,
        ratio_counts=ratios.counts,
        ratio_sum=ratios.sum,
        limit_busy_s=0.07,
        ideal_s=0.028,
        hardware_fraction=0.4,
        read_bytes_s=2e10,
        flops_s=4e11,
        phases=[("weights", 1.5), ("kv_cache", 0.25)],
        weights_read_bytes=1_000_000,
    )


def view(name: str, model: str = "m", told: ReplicaStats | None = None, num_ranks: int = 2) -> ReplicaView:
    ranks = [RankState(rank=rank, host="h", pid=rank, step=7, age_s=0.5 * rank) for rank in range(num_ranks)]
    beat = Beat(
        seq=1,
        state="ready",
        step=7,
        step_age_s=0.004,
        announced_s=0.012,
        num_running=4,
        num_waiting=2,
        blocks_used=30,
        blocks_total=40,
        granted=9,
        ranks=ranks,
        tokens_per_s=123.0,
    )
    return ReplicaView(name, model, beat, 0.25, told)


def plane(*replicas: ReplicaView, queued: dict[str, tuple[int, int]] | None = None) -> PlaneView:
    lag = Histogram(LAG_SECONDS)
    lag.observe(0.003)
    return PlaneView(
        models=tuple({replica.model for replica in replicas}),
        replicas=replicas,
        replica_states={"ready": len(replicas), "down": 1},
        queued=queued or {},
        links_ended={"lost": 2},
        faults={"replica_lost": 1},
        loop_lag=lag,
    )


def text(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def samples(metrics: Metrics) -> Samples:
    """By name and label values in the order of the description, as prometheus_client's own parser reads the page."""
    found: Samples = {}
    for family in text_string_to_metric_families(text(metrics)):
        for sample in family.samples:
            order = (*BY_NAME[family.name].label_names, "le")
            key = (sample.name, *(sample.labels[name] for name in order if name in sample.labels))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found
