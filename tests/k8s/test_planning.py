"""The figures of committed specs are the planner's, which k8s may not import."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from k8s.sizing import RANK_GPU_BYTES
from serving.planning.accelerators import ACCELERATORS, Figure
from serving.planning.demand import Demand, Machine
from serving.planning.lookup import find_config
from serving.planning.placements import find_placements
from serving.planning.plan import make_plan
from tests.k8s.manifests import OVERLAYS, manifests

SHAPE_OF = {
    "smollm2-135m-instruct": "smollm2-135m",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.1-405B-Instruct": "llama-3.1-405b",
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_bytes_and_rows_are_the_planners(overlay: str) -> None:
    m = manifests(overlay)
    model, engine = m.spec.model, m.spec.engine
    shape = SHAPE_OF[model.source]
    config, _ = find_config(shape, Path("/nonexistent"))
    demand = Demand(
        name=shape,
        config=config,
        context=model.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        dtype=model.dtype,
        quantization=model.quantization,
    )
    device = ACCELERATORS["h100-80gb" if m.spec.has_gpus else "cpu"]
    memory = engine.gpu_memory_bytes or 24 << 30
    machine = Machine(
        dataclasses.replace(device, memory_bytes=Figure(memory)), m.sizing.num_ranks, engine.gpus_per_host
    )
    [placement] = [
        found
        for found in find_placements(demand, machine)[0]
        if (found.tensor_size, found.pipeline_size) == (engine.tensor_parallel_size, engine.pipeline_parallel_size)
    ]
    plan = make_plan(demand, machine)
    assert model.rank_kv_bytes_per_token == placement.tightest.kv_per_token
    assert model.rank_weights_bytes == pytest.approx(placement.fullest.weights, rel=1e-3)
    assert model.weights_bytes == pytest.approx(2 * plan.parameters.total, rel=1e-3)  # files hold bf16
    assert model.max_model_len <= config.max_position_embeddings
    if m.spec.has_gpus:  # what we count on fits what the planner counts with
        assert m.sizing.kv_cache_bytes <= placement.tightest.free
        assert placement.fullest.workspace <= RANK_GPU_BYTES
        slowest = min(limit.tokens_s / limit.batch for limit in placement.decode)
        assert engine.slowest_tokens_per_s < slowest, "slower than the hardware's limit at the largest batch"


def test_every_overlay_serves_a_model_that_is_served() -> None:
    from serving.found import supported_architectures

    for overlay in OVERLAYS:
        config, _ = find_config(SHAPE_OF[manifests(overlay).spec.model.source], Path("/nonexistent"))
        assert config.model_type in supported_architectures()
