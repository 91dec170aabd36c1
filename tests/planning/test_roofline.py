"""The formulas: against hand-made figures, and against sums over every token."""

from __future__ import annotations

import dataclasses

import pytest

from serving.planning.roofline import Ceilings, ExpertShape, Shape, decode_time_min, prefill_time_min

H100 = Ceilings(read_bytes_s=3.0e12, flops_s=798e12)
LLAMA_8B = Shape(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    body_parameters=6_979_321_856,
    head_parameters=525_336_576,
    weight_bytes=2,
    kv_bytes=2,
)


def test_one_row_reads_the_weights() -> None:
    """5.00 ms for Llama-3.1-8B in bf16 at 3.0 TB/s."""
    assert decode_time_min(LLAMA_8B, [0], H100) == pytest.approx(5.003e-3, rel=1e-3)
    assert LLAMA_8B.kv_bytes_per_token == 131_072


def test_many_rows_compute_and_read_their_caches() -> None:
    shape, rows, context = LLAMA_8B, 512, 2000
    weights = 2 * 7_504_658_432 * rows / 798e12
    assert weights > 5.003e-3
    cache = 131_072 * rows * context / 3.0e12
    new = 131_072 * rows / 3.0e12
    assert decode_time_min(shape, [context] * rows, H100) == pytest.approx(weights + cache + new)


def test_attention_has_its_own_rate() -> None:
    slow = dataclasses.replace(H100, attention_flops_s=1e12)
    expected = 4 * 32 * 32 * 128 * 1000 / 1e12
    difference = decode_time_min(LLAMA_8B, [1000], slow) - decode_time_min(LLAMA_8B, [0], slow)
    assert difference == pytest.approx(expected)


def test_prompts_compute() -> None:
    """15.03 GFLOP per token of a prompt of 4,096."""
    per_token = prefill_time_min(LLAMA_8B, 4096, 0, H100) * 798e12 / 4096
    assert per_token == pytest.approx(15.03e9, rel=2e-3)


@pytest.mark.parametrize(("num_new", "num_cached", "window"), [(50, 0, 8), (5, 100, 8), (20, 3, 16), (9, 2, 64)])
def test_windows_bound_what_a_token_sees(num_new: int, num_cached: int, window: int) -> None:
    shape = dataclasses.replace(LLAMA_8B, num_layers=2, windows=(0, window))
    by_token = [(n, min(n, window)) for n in range(num_cached + 1, num_cached + num_new + 1)]
    exact = sum(everything + banded for everything, banded in by_token)
    assert shape.prompt_pairs(num_new, num_cached) == pytest.approx(exact, abs=num_new)  # an integral, not a sum
    assert shape.cached_pairs([num_cached]) == num_cached + min(num_cached, window - 1)
    assert shape.kv_bytes_per_token == 2 * 2 * 8 * 128 * 2  # windows do not shrink the cache


def test_experts_are_read_when_somebody_chose_them() -> None:
    experts = ExpertShape(num_experts=128, num_held=32, num_chosen=8, parameters=1_000_000)
    assert experts.read(1) == pytest.approx(32 * 8 / 128 * 1e6)
    assert experts.read(10_000) == pytest.approx(32e6)
    assert experts.read(16) == pytest.approx(32e6 * (1 - (15 / 16) ** 16))
    assert experts.multiplied == pytest.approx(2e6)
    shape = dataclasses.replace(LLAMA_8B, experts=experts)
    more_read = shape.parameters_read(1) - LLAMA_8B.parameters_read(1)
    more_computed = shape.linear_flops(3, 3) - LLAMA_8B.linear_flops(3, 3)
    assert (more_read, more_computed) == (pytest.approx(2e6), pytest.approx(12e6))
