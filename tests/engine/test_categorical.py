"""Order statistics and draws of one row against full sorts."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.categorical import CHUNK, SORTED_AT_ONCE, Categorical, invert_cdf, nucleus
from tests.engine.sampling_world import Floats

SIZES = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5003]


def make_row(size: int, seed: int, shape: str) -> Floats:
    rng = np.random.default_rng(seed)
    if shape == "normal":
        return (rng.standard_normal(size) * 3).astype(np.float32)
    if shape == "ties":  # few distinct values
        return rng.integers(-3, 4, size).astype(np.float32)
    if shape == "banned":  # only a handful left
        row = np.full(size, -np.inf, np.float32)
        left = rng.choice(size, min(size, 7), replace=False)
        row[left] = rng.standard_normal(left.size)
        return row
    assert shape == "flat"
    return (rng.standard_normal(size) * 1e-3).astype(np.float32)


@pytest.mark.parametrize("shape", ["normal", "ties", "banned", "flat"])
@pytest.mark.parametrize("size", SIZES)
def test_order_statistics_equal_a_full_sort(size: int, shape: str) -> None:
    row = make_row(size, size, shape)
    categorical = Categorical(size)
    by_value_then_id = np.lexsort((np.arange(size), -row))
    for k in {1, 2, 5, 20, CHUNK, 300, 2000, size} & set(range(1, size + 1)):
        assert categorical.kth_largest(row, k) == np.sort(row)[-k], k
        assert categorical.best_ids(row, k).tolist() == by_value_then_id[:k].tolist(), k


@pytest.mark.parametrize("shape", ["normal", "ties", "flat"])
@pytest.mark.parametrize("size", [*SIZES, 49152])
def test_nucleus_equals_a_full_sort(size: int, shape: str) -> None:
    row = make_row(size, size + 1, shape)
    weights = np.exp(row - row.max())
    total = float(weights.astype(np.float64).sum())
    descending = np.sort(weights)[::-1].astype(np.float64)
    held = np.cumsum(descending)
    for top_p in (1e-12, 0.01, 0.1234, 0.5, 0.9, 0.95, 0.99, 0.9999):
        last = min(int(np.searchsorted(held, top_p * total)), size - 1)
        expected = np.flatnonzero(weights >= descending[last])
        assert nucleus(weights, total, top_p).tolist() == expected.tolist(), top_p


def test_a_flat_distribution_is_wider_than_what_is_sorted_at_once() -> None:
    """The histogram ran in the test above, and finds a nucleus many times as wide as one sort."""
    row = make_row(49152, 3, "flat")
    weights = np.exp(row - row.max())
    kept = nucleus(weights, float(weights.sum(dtype=np.float64)), 0.9)
    assert 40 * SORTED_AT_ONCE < kept.size == pytest.approx(0.9 * 49152, rel=0.01)


def test_nucleus_of_equal_weights_is_everything() -> None:
    assert nucleus(np.ones(5000, np.float32), 5000.0, 0.1).size == 5000


def test_nucleus_almost_one_never_fails() -> None:
    row = make_row(5003, 9, "normal")
    weights = np.exp(row - row.max())
    for total in (float(weights.sum()), float(np.cumsum(weights)[-1]) * 1.00001):
        kept = nucleus(weights, total, 1 - 2**-53)
        assert weights[kept].sum() == pytest.approx(weights.sum(), rel=1e-5)


def test_invert_cdf_never_returns_an_entry_without_weight() -> None:
    cumulative = np.array([0.0, 0.0, 0.25, 0.25, 1.0, 1.0])
    found = [invert_cdf(cumulative, target) for target in (0.0, 0.2, 0.25, 0.9, 1.0)]
    assert found == [2, 2, 4, 4, 4]


@pytest.mark.parametrize("size", [*SIZES, 49152])
def test_a_plain_draw_inverts_the_cdf_in_vocabulary_order(size: int) -> None:
    row = make_row(size, size, "normal")
    peak = row.max()
    categorical = Categorical(size)
    cdf = np.cumsum(np.exp((row.astype(np.float64) - peak) / 0.8))
    cdf /= cdf[-1]
    for uniform in [0.0, 2**-53, *np.random.default_rng(2).random(500), 1 - 2**-53]:
        token = categorical.draw(row, peak, 0.8, np.float32(1 / 0.8), 0, 1.0, 0.0, uniform)
        below = cdf[token - 1] if token else 0.0
        assert below - 1e-6 <= uniform <= cdf[token] + 1e-6


def test_log_normaliser() -> None:
    row = make_row(49152, 4, "normal")
    expected = np.log(np.exp(row.astype(np.float64) - row.max()).sum())
    assert Categorical(row.size).log_normaliser(row, row.max()) == pytest.approx(expected, abs=1e-6)
