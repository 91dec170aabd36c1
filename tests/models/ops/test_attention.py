"""Paged attention: right by tolerance, and the same bits for a query in any chunk, batch and block order (C4, C9)."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from models.ops.cpu import CpuKernels
from models.ops.kernels import Kernels
from tests.models.ops.world import COMPILED, ORACLE, SERVING, Contexts, Heads, int32, name_of, same_bits

LENGTHS = [1, 15, 16, 17, 63, 65, 255, 257, 511, 512, 513, 1100]
SMOL = Heads(9, 3, 64)
ODD_HEADS = [Heads(4, 2, 24), Heads(4, 4, 40), Heads(6, 1, 80), Heads(8, 2, 96), Heads(2, 1, 256), Heads(3, 3, 2)]

each_set = pytest.mark.parametrize("kernels", SERVING, ids=name_of)
each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)


def assert_right(kernels: Kernels, contexts: Contexts, window: int, softcap: float = 0.0) -> None:
    """Against float64 over the very keys and values that the cache holds."""
    oracle = Contexts(ORACLE, contexts.lengths, contexts.heads, contexts.kv.key.dtype, contexts.block_size)
    for row in range(len(contexts.lengths)):
        (out, lse), (wanted_out, wanted_lse) = (each.whole(row, window, softcap) for each in (contexts, oracle))
        torch.testing.assert_close(out.double(), wanted_out, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(lse, wanted_lse, atol=5e-5, rtol=1e-5)
        assert (out.dtype, lse.dtype) == (kernels.activation_dtype, torch.float32)


@each_set
@pytest.mark.parametrize("window", [0, 100])
def test_equals_the_oracle(kernels: Kernels, window: int) -> None:
    assert_right(kernels, Contexts(kernels, LENGTHS, SMOL), window)


@each_set
@pytest.mark.parametrize("window", [0, 9, 63, 64, 65, 5000])
@pytest.mark.parametrize("softcap", [0.0, 1.5, 50.0])
def test_windows_and_soft_caps(kernels: Kernels, window: int, softcap: float) -> None:
    """Windows within a block, around a tile, larger than the context; scores here reach well beyond 1.5."""
    assert_right(kernels, Contexts(kernels, [1, 17, 140], Heads(4, 2, 24)), window, softcap)


@each_set
@pytest.mark.parametrize("window", [0, 70])
def test_a_capped_query_has_the_same_bits_alone_and_in_a_chunk(kernels: Kernels, window: int) -> None:
    contexts = Contexts(kernels, [300], Heads(4, 2, 64))
    out, lse = contexts.whole(0, window, softcap=2.0)
    assert not same_bits(out, contexts.whole(0, window)[0])
    for position in [0, 15, 16, 63, 64, 130, 255, 256, 299]:
        ((alone_out, alone_lse),) = contexts.attend([(0, position, 1)], window, softcap=2.0)
        assert same_bits(alone_out[0], out[position]) and same_bits(alone_lse[0], lse[position]), position


@each_set
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", ODD_HEADS, ids=str)
def test_unusual_heads(kernels: Kernels, heads: Heads, kv_dtype: torch.dtype) -> None:
    for window in (0, 1, 17):
        assert_right(kernels, Contexts(kernels, [1, 70, 300], heads, kv_dtype), window)


@each_compiled
@pytest.mark.parametrize("block_size", [32, 48, 256])
def test_larger_blocks(kernels: CpuKernels, block_size: int) -> None:
    contexts = Contexts(kernels, [1, 65, 300], SMOL, block_size=block_size)
    assert_right(kernels, contexts, 0)
    assert same_bits(contexts.whole(2)[0], Contexts(kernels, [1, 65, 300], SMOL).whole(2)[0])


@each_set
@pytest.mark.parametrize(
    ("window", "kv_dtype"),
    [(0, torch.bfloat16), (1, torch.bfloat16), (70, torch.float16), (300, torch.bfloat16), (0, torch.float16)],
    ids=str,
)
def test_a_query_has_the_same_bits_alone_and_in_a_chunk(kernels: Kernels, window: int, kv_dtype: torch.dtype) -> None:
    contexts = Contexts(kernels, [600], SMOL, kv_dtype)
    out, lse = contexts.whole(0, window)
    for position in [0, 1, 15, 16, 63, 64, 100, 255, 256, 257, 511, 512, 599]:
        ((alone_out, alone_lse),) = contexts.attend([(0, position, 1)], window)
        assert same_bits(alone_out[0], out[position]) and same_bits(alone_lse[0], lse[position]), position


@each_set
@pytest.mark.parametrize("seed", [0, 1])
def test_a_query_has_the_same_bits_in_any_mixture(kernels: Kernels, seed: int) -> None:
    """Chunks of random lengths, decodes and other sequences, in random order; blocks dealt otherwise."""
    chance = random.Random(seed)
    lengths = [300, 33, 1, 129, 64] if isinstance(kernels, CpuKernels) else [140, 33, 1]
    heads = SMOL if seed else Heads(4, 2, 24)
    window = chance.choice([0, 40])
    first_deal, second_deal = (Contexts(kernels, lengths, heads, deal=deal) for deal in (0, seed + 1))
    whole = [first_deal.whole(row, window) for row in range(len(lengths))]
    for _ in range(20):
        plan = []
        for row in chance.sample(range(len(lengths)), chance.randint(1, len(lengths))):
            count = chance.randint(1, min(lengths[row], chance.choice([1, 5, 200])))
            plan.append((row, chance.randint(0, lengths[row] - count), count))
        for (row, first, count), (out, lse) in zip(plan, second_deal.attend(plan, window), strict=True):
            assert same_bits(out, whole[row][0][first : first + count]), (plan, row)
            assert same_bits(lse, whole[row][1][first : first + count]), (plan, row)


@each_compiled
@pytest.mark.parametrize("window", [0, 500])
def test_threads_and_splits_do_not_change_bits(kernels: CpuKernels, window: int) -> None:
    """One long decode: walked by one thread, or its splits shared among several."""
    contexts = Contexts(kernels, [1100, 20], SMOL)
    results = []
    for num_threads in (1, 2, 3, 8):
        kernels.set_num_threads(num_threads)
        results.append(contexts.attend([(0, 1099, 1), (1, 3, 17)], window))
    for result in results[1:]:
        for (out, lse), (first_out, first_lse) in zip(result, results[0], strict=True):
            assert same_bits(out, first_out) and same_bits(lse, first_lse)


@each_set
@pytest.mark.parametrize("window", [0, 40])
def test_stale_blocks_never_leak(kernels: Kernels, window: int) -> None:
    """What lies behind a context, in its last block or in others' blocks, may be anything."""
    clean, dirty = (Contexts(kernels, [1, 17, 70], SMOL, stale=stale) for stale in (0.0, torch.nan))
    for row, softcap in itertools.product(range(3), (0.0, 20.0)):
        assert same_bits(clean.whole(row, window, softcap)[0], dirty.whole(row, window, softcap)[0])


@each_compiled
def test_padding_sees_nothing(kernels: CpuKernels) -> None:
    contexts = Contexts(kernels, [20], SMOL)
    plain = contexts.whole(0)
    first, (padding_out, padding_lse) = contexts.attend([(0, 0, 20)], num_padding=3)
    assert same_bits(first[0], plain[0])
    assert padding_out.count_nonzero() == 0 and padding_lse.isneginf().all()


@each_compiled
def test_large_scores_do_not_overflow(kernels: CpuKernels) -> None:
    contexts = Contexts(kernels, [100], SMOL)
    contexts.queries[0].mul_(1e4)
    out, lse = contexts.whole(0)
    assert out.isfinite().all() and lse.isfinite().all()


@each_compiled
def test_refuses_a_plan_that_points_elsewhere(kernels: CpuKernels) -> None:
    contexts = Contexts(kernels, [20], SMOL)
    contexts.tables[0][1] = 3
    with pytest.raises(ValueError, match=r"block id must be in 0\.\.2; got 3 at index 1"):
        contexts.whole(0)
    contexts.tables[0][1] = -1
    with pytest.raises(ValueError, match=r"block id must be in 0\.\.2; got -1"):
        contexts.whole(0)
    with pytest.raises(ValueError, match=r"seq_lens must be in 20\.\.16 .* got 20 in row 0"):
        contexts.tables[0].pop()
        contexts.whole(0)


@each_compiled
def test_refuses_a_soft_cap_that_is_none(kernels: CpuKernels) -> None:
    contexts = Contexts(kernels, [20], SMOL)
    for softcap in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"softcap must be at least 0 and finite; got {softcap}"):
            contexts.whole(0, softcap=softcap)


@each_compiled
def test_refuses_layouts_it_can_not_hold(kernels: CpuKernels) -> None:
    with pytest.raises(ValueError, match="block_size must be a multiple of 16; got 24"):
        kernels.allocate_kv(1, 2, 24, 1, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="head_size must be even and at most 256; got 258"):
        kernels.allocate_kv(1, 2, 16, 1, 258, torch.bfloat16)
    with pytest.raises(ValueError, match=r"KV dtype must be float32, bfloat16 or float16; got torch\.float64"):
        kernels.allocate_kv(1, 2, 16, 1, 64, torch.float64)


@each_compiled
def test_a_slot_outside_the_cache_is_refused_before_anything_is_written(kernels: CpuKernels) -> None:
    (kv,) = kernels.allocate_kv(1, 2, 16, 1, 8, torch.bfloat16)
    qkv, positions = torch.ones(2, 24), int32([0, 1])
    for slots in ([0, 32], [-1, 0]):
        with pytest.raises(ValueError, match=r"slot must be in 0\.\.31"):
            kernels.rope_store(qkv, positions, None, kv, int32(slots), 1, 1, 8)
    with pytest.raises(ValueError, match=r"position must be in 0\.\.0; got 1 at index 1"):
        kernels.rope_store(qkv, positions, torch.ones(1, 8), kv, int32([0, 1]), 1, 1, 8)
    assert kv.key.count_nonzero() == 0
