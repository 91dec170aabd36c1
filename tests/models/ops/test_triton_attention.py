"""Paged attention in Triton: what test_attention.py holds the CPU to, on a GPU or else under Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models.ops import triton_attention
from models.ops.triton import TritonKernels
from tests.models.ops.world import ORACLE, Contexts, Heads, same_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE, HALF, BRAIN = (TritonKernels(dtype, DEVICE) for dtype in (torch.float32, torch.float16, torch.bfloat16))
GROUPED = Heads(4, 2, 16)


@pytest.fixture(autouse=True)
def _quiet_infinities() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of them."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of keys instead of four, so that contexts with several splits stay small."""
    monkeypatch.setattr(triton_attention, "SPLIT", 128)


def assert_right(
    kernels: TritonKernels, contexts: Contexts, plan: list[tuple[int, int, int]], window: int, softcap: float
) -> None:
    oracle = Contexts(ORACLE, contexts.lengths, contexts.heads, contexts.kv.key.dtype, contexts.block_size)
    oracle.queries = [q.cpu().double() for q in contexts.queries]
    oracle.kv.key, oracle.kv.value = contexts.kv.key.cpu(), contexts.kv.value.cpu()  # the very cells, however rounded
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[kernels.activation_dtype]
    wanted = oracle.attend(plan, window, softcap=softcap)
    for (out, lse), (wanted_out, wanted_lse) in zip(
        contexts.attend(plan, window, softcap=softcap), wanted, strict=True
    ):
        torch.testing.assert_close(out.double(), wanted_out, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, wanted_lse, atol=tolerance, rtol=tolerance)
        assert (out.dtype, lse.dtype) == (kernels.activation_dtype, torch.float32)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (0, 1.5), (1, 0.0), (9, 0.0), (65, 1.5), (300, 0.0)])
def test_equals_the_oracle(window: int, softcap: float) -> None:
    """A decode, a chunk in the middle, a short prompt and a decode over several splits in one launch."""
    contexts = Contexts(WIDE, [33, 70, 5, 330], GROUPED, torch.float32)
    assert_right(WIDE, contexts, [(0, 32, 1), (1, 30, 40), (2, 0, 5), (3, 329, 1)], window, softcap)


@pytest.mark.parametrize(
    "heads", [Heads(3, 1, 24), Heads(7, 1, 40), Heads(2, 2, 80), Heads(2, 1, 256), Heads(71, 1, 2)], ids=str
)
def test_unusual_heads(heads: Heads) -> None:
    for window in (0, 17):
        assert_right(WIDE, Contexts(WIDE, [1, 50], heads, torch.float32), [(1, 20, 30), (0, 0, 1)], window, 0.0)


@pytest.mark.parametrize("block_size", [1, 24, 64])
def test_block_sizes(block_size: int) -> None:
    assert_right(WIDE, Contexts(WIDE, [70], GROUPED, torch.float32, block_size), [(0, 60, 10)], 0, 0.0)


@pytest.mark.parametrize(
    ("kernels", "kv_dtype"),
    [(HALF, torch.float16), (BRAIN, torch.bfloat16), (WIDE, torch.bfloat16), (BRAIN, torch.float32)],
    ids=["half", "bf16", "fp32 over bf16", "bf16 over fp32"],
)
def test_types(kernels: TritonKernels, kv_dtype: torch.dtype) -> None:
    contexts = Contexts(kernels, [300, 40], GROUPED, kv_dtype)
    assert_right(kernels, contexts, [(0, 296, 4), (1, 0, 40)], 0, 0.0)


@pytest.mark.usefixtures("_short_splits")
@pytest.mark.parametrize("window", [0, 70])
def test_a_query_has_the_same_bits_alone_and_in_a_chunk(window: int) -> None:
    contexts = Contexts(WIDE, [270], GROUPED, torch.float32)
    ((out, lse),) = contexts.attend([(0, 100, 170)], window)
    for position in [100, 127, 128, 131, 132, 255, 256, 269]:
        ((alone_out, alone_lse),) = contexts.attend([(0, position, 1)], window)
        assert same_bits(alone_out[0], out[position - 100]), position
        assert same_bits(alone_lse[0], lse[position - 100]), position


@pytest.mark.usefixtures("_short_splits")
@pytest.mark.parametrize(("kernels", "window"), [(WIDE, 40), (HALF, 0)], ids=["fp32", "half"])
def test_a_query_has_the_same_bits_in_any_mixture(kernels: TritonKernels, window: int) -> None:
    """Chunks of random lengths, decodes and other sequences, in random order; blocks dealt otherwise."""
    chance = random.Random(window)
    lengths, kv_dtype = [150, 33, 1, 70], kernels.activation_dtype
    first_deal, second_deal = (Contexts(kernels, lengths, GROUPED, kv_dtype, deal=deal) for deal in (0, 1))
    whole = [first_deal.whole(row, window) for row in range(len(lengths))]
    for _ in range(3):
        plan = []
        for row in chance.sample(range(len(lengths)), chance.randint(1, len(lengths))):
            count = chance.randint(1, min(lengths[row], chance.choice([1, 5, 60])))
            plan.append((row, chance.randint(0, lengths[row] - count), count))
        for (row, first, count), (out, lse) in zip(plan, second_deal.attend(plan, window), strict=True):
            assert same_bits(out, whole[row][0][first : first + count]), (plan, row)
            assert same_bits(lse, whole[row][1][first : first + count]), (plan, row)


@pytest.mark.usefixtures("_short_splits")
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (150, 2.0)])
def test_who_folds_the_splits_does_not_change_bits(window: int, softcap: float) -> None:
    """A program per split and a second kernel, or one program for all."""
    together = TritonKernels(torch.float32, DEVICE)
    together.max_part_bytes = 0
    plan = [(0, 297, 3), (1, 3, 17)]
    results = []
    for kernels in (WIDE, together):
        results.append(Contexts(kernels, [300, 20], GROUPED, torch.float32).attend(plan, window, softcap=softcap))
    for (out, lse), (other_out, other_lse) in zip(*results, strict=True):
        assert same_bits(out, other_out) and same_bits(lse, other_lse)


@pytest.mark.parametrize("window", [0, 40])
def test_stale_blocks_never_leak(window: int) -> None:
    """What lies behind a context, in its last block or in others' blocks, may be anything."""
    clean, dirty = (Contexts(WIDE, [17, 70], GROUPED, torch.float32, stale=stale) for stale in (0.0, torch.nan))
    for row, softcap in itertools.product(range(2), (0.0, 20.0)):
        assert same_bits(clean.whole(row, window, softcap)[0], dirty.whole(row, window, softcap)[0])


def test_padding_sees_nothing() -> None:
    contexts = Contexts(WIDE, [20, 300], GROUPED, torch.float32)
    plan = [(0, 0, 20), (1, 299, 1)]
    plain = contexts.attend(plan)
    *padded, (padding_out, padding_lse) = contexts.attend(plan, num_padding=70)
    assert all(same_bits(one[0], other[0]) for one, other in zip(plain, padded, strict=True))
    assert padding_out.count_nonzero() == 0 and padding_lse.isneginf().all()


def test_large_scores_do_not_overflow() -> None:
    contexts = Contexts(WIDE, [40], GROUPED, torch.float32)
    contexts.queries[0].mul_(1e4)
    out, lse = contexts.whole(0)
    assert out.isfinite().all() and lse.isfinite().all()


def test_refuses_senseless_parameters() -> None:
    contexts = Contexts(WIDE, [4], GROUPED, torch.float32)
    for window, softcap in ((-1, 0.0), (0, -1.0), (0, math.inf), (0, math.nan)):
        with pytest.raises(ValueError, match=rf"window must be at least 0.*; got {window}, 0.25 and {softcap}"):
            contexts.whole(0, window, softcap)
