"""A checkpoint divided among ranks and stages, and its bits under every cut of the work (C4, C7, C11)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.kv_cache import KVCache
from models.ops.select import select_kernels
from models.parallel import Group, Stages
from models.registry import CausalLM, load_config, load_model
from tests.models.architectures.parity import TOLERANCE, some_tokens
from tests.models.paged import BLOCK_SIZE, Sequences, advance_at_random
from tests.models.test_parallel import on_ranks


def assert_ranks_agree(folder: Path, sizes: Sequence[int] = (2, 4)) -> None:
    """Tensor-parallel ranks have each other's bits and, within the tolerance, one rank's logits."""
    expected = _logits(load_model(folder, dtype="float32"), Group())
    for size in sizes:
        models = on_ranks(size, lambda group: load_model(folder, dtype="float32", group=group))
        results = on_ranks(size, lambda group, models=models: _logits(models[group.rank], group))  # type: ignore[misc]
        for result in results:
            assert torch.equal(result, results[0])
        assert results[0].shape == expected.shape
        assert (results[0] - expected).abs().max().item() <= TOLERANCE


def assert_stages_agree(folder: Path, count: int = 2) -> None:
    """Pipeline stages, one after the other, give the bits of one process."""
    whole = load_model(folder, dtype="float32")
    (ids,) = some_tokens([33], whole.config.vocab_size)
    sequences = Sequences(whole, [ids], torch.float32)
    batch = sequences.batch([(0, 33)])
    expected = whole.forward(batch, sequences.kv_cache)
    hidden = None
    for index in range(count):
        stages = Stages(index, count)
        part = load_model(folder, dtype="float32", stages=stages)
        cache = KVCache(part.config, part.kernels, sequences.kv_cache.num_blocks, BLOCK_SIZE, torch.float32, stages)
        hidden = part.forward(batch, cache, hidden)
    assert hidden is not None
    assert torch.equal(hidden, expected)


BACKENDS = [("cpu", torch.bfloat16), ("cpu", torch.float32), ("tiled", torch.float32)]
"""Kernels that serve on CPUs, and types of weights and KV."""


def assert_invariant(folder: Path, dtype: torch.dtype, kind: str = "auto") -> None:
    """The bits of exact kernels do not depend on chunks, neighbours and blocks."""
    try:
        kernels = select_kernels(torch.device("cpu"), dtype, kind)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"{kind} kernels are not available: {error}")
    model = load_model(folder, dtype=dtype, kernels=kernels)
    if not kernels.is_exact:  # the tiled set tries its BLAS on every weight
        pytest.skip(f"{kernels.name} kernels are not exact on this machine")
    tokens = some_tokens((1, 2, 17, 48, 75), load_config(folder).vocab_size, seed=3)
    alone = []
    for ids in tokens:
        sequence = Sequences(model, [ids], dtype)
        sequence.step([(0, len(ids))])
        alone.append(sequence.all_logits(0))
    decoded = Sequences(model, tokens[-1:], dtype, seed=7)
    for _ in tokens[-1]:
        decoded.step([(0, 1)])
    assert torch.equal(decoded.all_logits(0), alone[-1]), "decoding token by token differs"
    for seed in range(2):
        mixed = Sequences(model, tokens, dtype, seed)
        advance_at_random(mixed, random.Random(seed), max_count=40)
        for i, logits in enumerate(alone):
            assert torch.equal(mixed.all_logits(i), logits), f"sequence {i} differs (seed {seed})"


def _logits(model: CausalLM, group: Group) -> torch.Tensor:
    """Of a sequence computed among another, in chunks and by itself."""
    with torch.inference_mode():  # of the caller's thread alone
        ids = some_tokens([40, 7], model.config.vocab_size)
        sequences = Sequences(model, ids, torch.float32, group=group)
        sequences.step([(0, 25)])
        sequences.step([(1, 7), (0, 14)])
        sequences.step([(0, 1)])
        return sequences.all_logits(0)
