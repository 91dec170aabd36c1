"""One row of logits: order statistics, log-normaliser, and a draw from its truncated softmax.

Everything here takes one row and works on arrays whose shapes follow that row alone, single-threaded, so
that a row's bits cannot depend on its neighbours, on the batch or on a thread count (C4). numpy sums in an
order fixed by the length; `CHUNK` makes the two-level sums of vocabulary-sized rows independent of all else.

Truncations follow vLLM: temperature first, then min_p, top_k, top_p on what top_k left. Each is a threshold
on the value, so tokens that tie with the last one kept are kept as well, whatever their ids.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatRow = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

CHUNK = 256
_FINE_CHUNK = 16
SORTED_AT_ONCE = 1024
_BUCKET_SHIFT = 16  # 7 bits of mantissa: 128 buckets per power of two
_ONE_BITS = np.int32(0x3F800000)
_ROUNDING_ROOM = 0.999  # relative errors of the float32 sums are below 1e-5


def invert_cdf(cumulative: Doubles, target: float) -> int:
    """Index of the first entry above `target`; the last one that adds weight when none is.

    cumulative: float64 [n], non-decreasing, ending above zero. target in [0, cumulative[-1]], where only
    rounding can make it reach the end. An entry without weight is never returned.
    """
    index = int(cumulative.searchsorted(target, side="right"))
    if index == cumulative.size:
        index = int(cumulative.searchsorted(cumulative[-1], side="left"))
    return index


def nucleus(weights: FloatRow, total: float, top_p: float) -> Indices:
    """Indices, ascending, of the smallest set of largest weights that holds top_p of `total`, ties included.

    weights: float32 [n] in [0, 1], not normalised, their sum `total`; the largest is 1. 0 < top_p < 1.

    Linear in n, no full sort (C3). First, all weights below (1 - top_p) * total / n hold less than 1 - top_p
    together, so none of them belongs to the nucleus, and few others are left unless the distribution is flat.
    If it is, a histogram over the leading bits finds the narrow range of weights in which the sum is reached.
    """
    goal = top_p * total
    indices = np.flatnonzero(weights >= _ROUNDING_ROOM * (1.0 - top_p) * total / weights.size)
    candidates = contenders = weights[indices]
    held_before = 0.0
    if candidates.size > SORTED_AT_ONCE:
        # Positive floats order as their bits do; bucket 0 holds the largest.
        buckets = (_ONE_BITS - candidates.view(np.int32)) >> _BUCKET_SHIFT
        masses = np.cumsum(np.bincount(buckets, weights=candidates))
        bucket = min(int(masses.searchsorted(goal, side="left")), masses.size - 1)
        held_before = float(masses[bucket - 1]) if bucket else 0.0
        contenders = candidates[buckets == bucket]
    descending = np.sort(contenders)[::-1]
    held = held_before + np.cumsum(descending, dtype=np.float64)
    last = min(int(held.searchsorted(goal, side="left")), held.size - 1)  # clipped where rounding decides
    kept: Indices = indices[candidates >= descending[last]]
    return kept


class Categorical:
    """Draws from rows of one vocabulary size; owns the scratch memory for it."""

    def __init__(self, size: int) -> None:
        """size: width of the rows, >= 1."""
        self._starts = np.arange(0, size, CHUNK)
        self._fine_starts = np.arange(0, size, _FINE_CHUNK)
        self._weights = np.empty(size, np.float32)

    def log_normaliser(self, row: FloatRow, peak: np.float32) -> float:
        """log(sum(exp(row - peak))). row: float32 [size]; peak: its maximum, finite."""
        sums = self._exp(row, peak, np.float32(1.0))
        return math.log(sums[-1])

    def draw(
        self,
        row: FloatRow,
        peak: np.float32,
        temperature: float,
        inverse_temperature: np.float32,
        top_k: int,
        top_p: float,
        min_p: float,
        uniform: float,
    ) -> int:
        """The token id at which the CDF, in vocabulary order, passes `uniform` in [0, 1).

        row: float32 [size], -inf = banned, no NaN; peak: its maximum, finite. temperature > 0. top_k 0,
        top_p 1 and min_p 0 are off.
        """
        floor = -math.inf
        if 0 < top_k < row.size:
            floor = float(self.kth_largest(row, top_k))
        if min_p > 0.0:
            # exp((x - peak) / T) >= min_p, solved for x: no exponentials of a whole row.
            floor = max(floor, float(peak) + temperature * math.log(min_p))
        if floor > -math.inf:
            ids = np.flatnonzero(row >= floor)
            weights = np.exp((row[ids] - peak) * inverse_temperature)
            if top_p < 1.0:
                kept = nucleus(weights, float(weights.astype(np.float64).sum()), top_p)
                ids, weights = ids[kept], weights[kept]
        else:
            sums = self._exp(row, peak, inverse_temperature)
            if top_p >= 1.0:
                return self._invert_chunks(sums, uniform * float(sums[-1]))
            ids = nucleus(self._weights, float(sums[-1]), top_p)
            weights = self._weights[ids]
        cumulative = np.cumsum(weights, dtype=np.float64)
        return int(ids[invert_cdf(cumulative, uniform * float(cumulative[-1]))])

    def kth_largest(self, row: FloatRow, k: int) -> np.float32:
        """The k-th largest value of row, float32 [size]; 1 <= k <= size."""
        values = row[self._leading_ids(row, k)]
        kth: np.float32 = np.partition(values, values.size - k)[-k]
        return kth

    def best_ids(self, row: FloatRow, k: int) -> Indices:
        """Ids of the k largest values, best first, the lowest id first among equals. 1 <= k <= size."""
        ids = self._leading_ids(row, k)
        best: Indices = ids[np.argsort(-row[ids], kind="stable")[:k]]
        return best

    def _leading_ids(self, row: FloatRow, k: int) -> Indices:
        """Ascending ids of the k largest values, their ties, and usually not many others.

        The k-th largest of the maxima of more than k chunks is a lower bound of the k-th largest value, and
        a close one while k is small.
        """
        if k <= self._fine_starts.size:
            starts = self._starts if k <= self._starts.size // 2 else self._fine_starts
            maxima = np.maximum.reduceat(row, starts)
            bound = np.partition(maxima, maxima.size - k)[-k]
        else:
            bound = np.partition(row, row.size - k)[-k]
        ids: Indices = np.flatnonzero(row >= bound)
        return ids

    def _exp(self, row: FloatRow, peak: np.float32, scale: np.float32) -> Doubles:
        """Fill the scratch with exp((row - peak) * scale); running sums over its chunks, float64 [chunks]."""
        weights = self._weights
        np.subtract(row, peak, out=weights)
        if scale != 1.0:
            np.multiply(weights, scale, out=weights)
        np.exp(weights, out=weights)
        return np.cumsum(np.add.reduceat(weights, self._starts), dtype=np.float64)

    def _invert_chunks(self, sums: Doubles, target: float) -> int:
        """`invert_cdf` of the scratch in two levels: the chunk, then the token within it."""
        chunk = invert_cdf(sums, target)
        before = float(sums[chunk - 1]) if chunk else 0.0
        start = chunk * CHUNK
        within = np.cumsum(self._weights[start : start + CHUNK], dtype=np.float64)
        return start + invert_cdf(within, target - before)
