"""What a replica tells a gateway of itself in its beats (C13), shown by the gateway under the replica's name."""

from __future__ import annotations

from collections.abc import Callable

from serving.metrics import labels
from serving.metrics.description import Kind, Metric, Value
from serving.metrics.feeds import by_replica, by_stats, phases, ranks
from serving.metrics.histogram import RATIOS, STEP_SECONDS, Histogram
from serving.metrics.labels import REPLICA
from serving.metrics.snapshot import ReplicaView
from serving.types import ReplicaStats

_STEPS = "replica's step records"
_BEATS = "replica's beats"
_LOADING = "replica's loading"


def _beat(name: str, unit: str, help: str, read: Callable[[ReplicaView], float]) -> Metric:
    return Metric(f"argosy_replica_{name}", "gauge", unit, help, by_replica(read), _BEATS, (REPLICA,))


def _stats(
    kind: Kind,
    name: str,
    unit: str,
    help: str,
    read: Callable[[ReplicaStats], Value | None],
    bounds: tuple[float, ...] = (),
) -> Metric:
    return Metric(f"argosy_replica_{name}", kind, unit, help, by_stats(read), _STEPS, (REPLICA,), bounds)


REPLICA_METRICS = (
    _beat("beat_age_seconds", "seconds", "Since the replica's last beat.", lambda v: v.beat_age_s),
    _beat(
        "step_age_seconds",
        "seconds",
        "Age of the running step, as of that beat; 0 at rest.",
        lambda v: v.beat.step_age_s,
    ),
    _beat("announced_step_seconds", "seconds", "Predicted duration of the running step.", lambda v: v.beat.announced_s),
    _beat("rows_running", "rows", "Rows in the batch.", lambda v: v.beat.num_running),
    _beat("rows_waiting", "rows", "Rows that wait for a slot inside the replica.", lambda v: v.beat.num_waiting),
    _beat(
        "kv_blocks_used",
        "blocks",
        "KV blocks that rows own; reusable prefixes of nobody are free.",
        lambda v: v.beat.blocks_used,
    ),
    _beat("kv_blocks", "blocks", "KV blocks in all.", lambda v: v.beat.blocks_total),
    _beat(
        "tokens_per_second", "tokens/s", "Tokens sampled over the last second of work.", lambda v: v.beat.tokens_per_s
    ),
    Metric(
        "argosy_rank_age_seconds",
        "gauge",
        "seconds",
        "Since a rank last made progress; 0 at rest but for the age of the news.",
        ranks,
        _BEATS,
        (REPLICA, labels.RANK),
    ),
    _stats("counter", "steps", "steps", "Steps completed.", lambda s: s.steps),
    _stats(
        "counter",
        "prefill_tokens",
        "tokens",
        "Tokens of prompts computed, again after a preemption.",
        lambda s: s.prefill_tokens,
    ),
    _stats("counter", "decode_tokens", "tokens", "Tokens computed one per row and step.", lambda s: s.decode_tokens),
    _stats(
        "counter", "preemptions", "rows", "Rows put out of the batch for want of KV blocks.", lambda s: s.preemptions
    ),
    _stats(
        "counter",
        "prefix_queried_tokens",
        "tokens",
        "Tokens of rows when they were first admitted.",
        lambda s: s.prefix_queried,
    ),
    _stats(
        "counter", "prefix_hit_tokens", "tokens", "Those of them that the prefix cache held.", lambda s: s.prefix_hits
    ),
    _stats(
        "counter",
        "kv_blocks_evicted",
        "blocks",
        "Reusable prefixes overwritten for want of fresh blocks.",
        lambda s: s.blocks_evicted,
    ),
    _stats(
        "histogram",
        "step_seconds",
        "seconds",
        "Duration of a step, from its submission or its predecessor's result to its own.",
        lambda s: Histogram.of(STEP_SECONDS, s.step_counts, s.step_sum),
        STEP_SECONDS,
    ),
    _stats(
        "histogram",
        "step_prediction_ratio",
        "1",
        "Duration of a step over what was announced before it ran; above 1 = slower than predicted.",
        lambda s: Histogram.of(RATIOS, s.ratio_counts, s.ratio_sum),
        RATIOS,
    ),
    _stats(
        "counter",
        "step_busy_seconds",
        "seconds",
        "Sum of the durations of steps whose ideal is known.",
        lambda s: s.limit_busy_s if s.hardware_fraction is not None else None,
    ),
    _stats(
        "counter",
        "step_ideal_seconds",
        "seconds",
        "What the hardware's limit would have taken for them.",
        lambda s: s.ideal_s if s.hardware_fraction is not None else None,
    ),
    _stats(
        "gauge",
        "hardware_fraction",
        "1",
        "Ideal over actual duration of the last seconds of steps; absent where the limit is not known.",
        lambda s: s.hardware_fraction,
    ),
    _stats(
        "gauge",
        "read_limit_bytes_per_second",
        "bytes/s",
        "Memory reads that the ideal assumes.",
        lambda s: s.read_bytes_s,
    ),
    _stats(
        "gauge",
        "compute_limit_flops",
        "operations/s",
        "Arithmetic of linears that the ideal assumes.",
        lambda s: s.flops_s,
    ),
    Metric(
        "argosy_replica_start_seconds",
        "gauge",
        "seconds",
        "Duration of each phase of the replica's cold start.",
        phases,
        _LOADING,
        (REPLICA, labels.PHASE),
    ),
    Metric(
        "argosy_replica_weights_read_bytes",
        "gauge",
        "bytes",
        "Weights read from the model folder at the start, by rank 0.",
        by_stats(lambda s: s.weights_read_bytes),
        _LOADING,
        (REPLICA,),
    ),
)
