"""The noise is a fixed function: changing one bit of it breaks every resumed stream."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.noise import noise_bits, noise_key, uniforms
from tests.engine.sampling_world import int32


def test_it_is_splitmix64() -> None:
    """First outputs of the generator for seed 1234567, as published with its reference implementation."""
    keys = np.full(5, 1234567, np.uint64)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert noise_bits(keys, np.arange(5, dtype=np.int32)).tolist() == expected


GOLDEN = {
    (0, 0, 0): "0x1.1c13ade1c7e5cp-3",
    (0, 0, 1): "0x1.f1344acd6b045p-1",
    (0, 1, 0): "0x1.7880ff10a4b74p-3",
    (1, 0, 0): "0x1.631405e8db1b0p-1",
    (42, 3, 1000): "0x1.00d11e1ef87e6p-1",
    (2**64 - 1, 127, 131071): "0x1.36f72854c0d6dp-1",
    (-7, 0, 5): "0x1.4f8011a581058p-4",
}


def test_golden_vector() -> None:
    """Whatever the process, machine or version: these are the uniforms of these rows."""
    for (seed, choice, position), expected in GOLDEN.items():
        (uniform,) = uniforms(np.array([noise_key(seed, choice)]), int32(position))
        assert float(uniform).hex() == expected, (seed, choice, position)


def test_a_row_does_not_see_its_neighbours() -> None:
    keys = np.array([noise_key(seed, choice) for seed in range(20) for choice in range(5)])
    positions = np.arange(100, dtype=np.int32)
    together = uniforms(keys, positions)
    order = np.random.default_rng(1).permutation(100)
    assert (uniforms(keys[order], positions[order]) == together[order]).all()
    assert [float(uniforms(keys[i : i + 1], positions[i : i + 1])[0]) for i in range(100)] == together.tolist()


def test_seeds_beyond_64_bits_wrap() -> None:
    assert noise_key(-1, 0) == noise_key(2**64 - 1, 0)
    assert noise_key(2**64, 0) == noise_key(0, 0)


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_uniform_and_uncorrelated_along_every_axis(axis: str) -> None:
    """Mean, variance, lag-one correlation and a 64-bin chi-square of 16,384 neighbouring counters."""
    count = 1 << 14
    steps = np.arange(count, dtype=np.int32)
    if axis == "position":
        values = uniforms(np.full(count, noise_key(7, 3)), steps)
    else:
        keys = [noise_key(i, 3) if axis == "seed" else noise_key(7, i) for i in range(count)]
        values = uniforms(np.array(keys), np.full(count, 11, np.int32))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    sigma = count**-0.5
    assert abs(values.mean() - 0.5) < 4 * sigma * 12**-0.5
    assert abs(values.var() - 1 / 12) < 4 * sigma * 180**-0.5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 * sigma
    bins = np.bincount((values * 64).astype(int), minlength=64)
    chi_square = float(((bins - count / 64) ** 2).sum() / (count / 64))
    assert 63 - 4 * 126**0.5 < chi_square < 63 + 4 * 126**0.5


def test_no_two_counters_share_their_noise() -> None:
    keys = np.array([noise_key(seed, choice) for seed in range(100) for choice in range(20)])
    bits = noise_bits(np.repeat(keys, 64), np.tile(np.arange(64, dtype=np.int32), keys.size))
    assert np.unique(bits).size == bits.size
