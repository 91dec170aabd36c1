"""The only randomness of sampling: one uniform per (seed, choice, position), computed, never drawn (C3).

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) with
the finaliser of Stafford's variant 13. Output number n of that generator is a function of its key and n
alone, so there is no state: a preempted, resumed or rescheduled row meets the same numbers again.
Integer arithmetic modulo 2**64 only, hence the same bits on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: n -> n * gamma is a bijection
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_U64_MASK = (1 << 64) - 1


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Stafford's variant 13: a bijection of uint64 in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


def noise_key(seed: int, choice: int) -> np.uint64:
    """Key of one choice's noise. seed, choice: any integers, taken modulo 2**64."""
    seeds = np.array([seed & _U64_MASK], np.uint64)
    choices = np.array([choice & _U64_MASK], np.uint64)
    key: np.uint64 = mix64(mix64(seeds + _GAMMA) + (choices + np.uint64(1)) * _GAMMA)[0]
    return key


def noise_bits(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """Output number positions[i] of the SplitMix64 generator keys[i]. Both [S]; uint64 [S]."""
    return mix64(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1) with 53 bits. keys uint64 [S]; positions int32 [S]; float64 [S]."""
    return (noise_bits(keys, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53
