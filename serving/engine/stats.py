"""What a replica tells of itself beyond its health: counts since its start, and how it started."""

from __future__ import annotations

from collections.abc import Callable

from serving.engine.assembly import Engine
from serving.engine.core import EngineCore
from serving.engine.worker import LoadCallback
from serving.types import ModelCard, ReplicaStats

_PHASES = {"weights": "weights", "kv cache": "kv_cache", "hardware limit": "limit"}


class Start:
    """Hears the phases of a cold start, keeps them and passes them on."""

    def __init__(self, on_phase: Callable[[str, float], None] | None, on_load: LoadCallback | None) -> None:
        self.phases: dict[str, float] = {}  # seconds by the label of /metrics
        self.weights_read_bytes = 0
        self._on_phase = on_phase
        self._on_load = on_load

    def phase(self, name: str, seconds: float) -> None:
        label = "gang" if name.startswith("gang") else _PHASES.get(name, "other")
        self.phases[label] = self.phases.get(label, 0.0) + seconds
        if self._on_phase is not None:
            self._on_phase(name, seconds)

    def load(self, done_bytes: int, total_bytes: int, seconds: float) -> None:
        self.weights_read_bytes = done_bytes
        if self._on_load is not None:
            self._on_load(done_bytes, total_bytes, seconds)


def stats_of(engine: Engine, start: Start) -> ReplicaStats:
    """Read by the server's thread while the step loop writes: numbers of neighbouring steps may stand together."""
    scheduler = engine.core.scheduler
    tally = scheduler.tally
    ceilings = engine.core.limit.ceilings if engine.core.limit is not None else None
    return ReplicaStats(
        steps=tally.num_steps,
        prefill_tokens=tally.prefill_tokens,
        decode_tokens=tally.decode_tokens,
        preemptions=tally.num_preemptions,
        prefix_queried=tally.prefix_queried,
        prefix_hits=tally.prefix_hits,
        blocks_evicted=scheduler.pool.num_evicted,
        step_counts=tally.step_seconds.counts,
        step_sum=tally.step_seconds.sum,
        ratio_counts=tally.prediction.counts,
        ratio_sum=tally.prediction.sum,
        limit_busy_s=tally.limit_busy_s,
        ideal_s=tally.ideal_s,
        hardware_fraction=tally.hardware_fraction,
        read_bytes_s=ceilings.read_bytes_s if ceilings else None,
        flops_s=ceilings.flops_s if ceilings else None,
        phases=list(start.phases.items()),
        weights_read_bytes=start.weights_read_bytes,
    )


def load_of(core: EngineCore, card: ModelCard, num_finished: int) -> dict[str, float]:
    """The numbers of a beat, by the names under which `serving/deployments/serve_policy.py` reads them.

    num_finished: rows that ended here since the start.
    """
    scheduler = core.scheduler
    return {
        "running": scheduler.num_running,
        "waiting": scheduler.num_waiting,
        "max_num_seqs": card.max_num_seqs,
        "blocks_used": scheduler.pool.num_owned,
        "blocks_total": scheduler.pool.num_blocks - 1,
        "block_size": card.block_size,
        "finished": num_finished,
        "tokens_per_s": core.tokens_per_s,
    }
