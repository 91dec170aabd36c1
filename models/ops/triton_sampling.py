"""Sampling in Triton: a token per row from its logits, and whether they are garbage.

A random row takes the token whose logit over temperature plus Gumbel noise is the largest (Gumbel 1954; "Gumbel-max"):
the noise of a token is a function of the row's state and the token's id alone, so a row's token depends neither on its
batch nor on how the vocabulary is cut. top_k, min_p and top_p are thresholds on the logit, in this order, and keep what
ties with the last one kept. Each is found by halving the range of the floats' bit patterns: sums run over a row in one
fixed order.

Row parameters are int32 [NUM_SAMPLING_FIELDS, rows or more], floats as their bits:
    0, 1    low and high word of the row's noise state
    2       1 / temperature; 0 = greedy
    3       top_k; 0 = off
    4       top_p; 1 = off
    5       min_p as a distance to the largest logit, <= 0; -inf = off
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 4096
_SCAN = 8192  # values of a row that one turn of a scan looks at

GAMMA, MULTIPLIER_1, MULTIPLIER_2 = (
    tl.constexpr(i) for i in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # SplitMix64's, as in the engine's noise


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """Integers that order as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _num_above(row: tl.tensor, known: tl.tensor, bound: tl.tensor, SCAN: tl.constexpr) -> tl.tensor:
    """How many logits are at or above a bound, given in `_order`."""
    found = tl.zeros([SCAN], tl.int32)
    for start in range(0, known, SCAN):
        i = start + tl.arange(0, SCAN)
        x = tl.load(row + i, mask=i < known, other=float("-inf"))
        found += ((_order(x) >= bound) & (i < known)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def _mass_above(
    row: tl.tensor, known: tl.tensor, bound: tl.tensor, peak: tl.tensor, inverse: tl.tensor, SCAN: tl.constexpr
) -> tl.tensor:
    """Their weights exp((x - peak) / temperature), summed."""
    found = tl.zeros([SCAN], tl.float32)
    for start in range(0, known, SCAN):
        i = start + tl.arange(0, SCAN)
        x = tl.load(row + i, mask=i < known, other=float("-inf"))
        is_above = (_order(x) >= bound) & (x > float("-inf"))
        found += tl.where(is_above, tl.exp((x - peak) * inverse), 0.0)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["known", "stride"])
def _floors(
    logits: tl.tensor,
    rows: tl.tensor,
    floors: tl.tensor,
    width: tl.tensor,
    known: tl.tensor,
    stride: tl.tensor,
    SCAN: tl.constexpr,
) -> None:
    """The least logit that each row may choose."""
    at = tl.program_id(0)
    top_k = tl.minimum(tl.load(rows + 3 * stride + at), known)
    top_p = _float(tl.load(rows + 4 * stride + at))
    distance = _float(tl.load(rows + 5 * stride + at))
    if (top_k == 0) & (top_p >= 1.0) & (distance == float("-inf")):
        tl.store(floors + at, float("-inf"))
        return
    row = logits + at.to(tl.int64) * width
    best = tl.full([SCAN], float("-inf"), tl.float32)
    for start in range(0, known, SCAN):
        i = start + tl.arange(0, SCAN)
        best = tl.maximum(best, tl.load(row + i, mask=i < known, other=float("-inf")))
    peak = tl.max(best, 0)
    least = -2147483648 + tl.zeros([1], tl.int64)  # what surely holds enough
    most = _order(peak + tl.zeros([1], tl.float32)).to(tl.int64) + 1  # what holds nothing
    if distance > float("-inf"):
        least = tl.maximum(least, _order(peak + distance + tl.zeros([1], tl.float32)).to(tl.int64))
    if top_k > 0:
        low, high = least * 0 - 2147483648, most
        for _ in range(33):
            middle = (low + high) >> 1
            is_enough = _num_above(row, known, middle, SCAN) >= top_k
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, tl.maximum(middle, low + 1))
        least = tl.maximum(least, low)
    if top_p < 1.0:
        inverse = _float(tl.load(rows + 2 * stride + at))
        goal = top_p * _mass_above(row, known, least, peak, inverse, SCAN)
        low, high = least, most
        for _ in range(33):
            middle = (low + high) >> 1
            is_enough = _mass_above(row, known, middle, peak, inverse, SCAN) >= goal
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, tl.maximum(middle, low + 1))
        least = low
    bits = least.to(tl.int32)
    tl.store(floors + at + tl.arange(0, 1), _float(tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)))


@triton.jit
def _exponential(bits: tl.tensor) -> tl.tensor:
    """-log of a uniform number in (0, 1), from 64 random bits; precise where it is small, for the small ones win."""
    v = ((bits >> 32).to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 0.99999994)
    small = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
    return tl.where(v < 0.01, small, -tl.log(1.0 - v))


@triton.jit(do_not_specialize=["known", "stride"])
def _best_of_chunk(
    logits: tl.tensor,
    rows: tl.tensor,
    floors: tl.tensor,
    scores: tl.tensor,  # [rows, chunks], like ids and peaks
    ids: tl.tensor,
    peaks: tl.tensor,
    width: tl.tensor,
    known: tl.tensor,
    stride: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    at, chunk = tl.program_id(0), tl.program_id(1)
    i = chunk * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits + at.to(tl.int64) * width + i, mask=i < known, other=float("-inf"))
    is_garbage = (x != x) | (x == float("inf"))
    score = x
    inverse = _float(tl.load(rows + 2 * stride + at))
    if inverse > 0:
        low = tl.load(rows + at).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(rows + stride + at).to(tl.uint32, bitcast=True).to(tl.uint64)
        bits = ((high << 32) | low) + (i + 1).to(tl.uint64) * GAMMA
        bits = (bits ^ (bits >> 30)) * MULTIPLIER_1
        bits = (bits ^ (bits >> 27)) * MULTIPLIER_2
        bits = bits ^ (bits >> 31)
        score = x * inverse - tl.log(_exponential(bits))
    score = tl.where((x >= tl.load(floors + at)) & (i < known), score, float("-inf"))
    best, where = tl.max(score, 0, return_indices=True)
    place = at * tl.num_programs(1) + chunk
    tl.store(scores + place, best)
    tl.store(ids + place, chunk * SIZE + where)
    tl.store(peaks + place, tl.max(tl.where(is_garbage, float("inf"), x), 0))


@triton.jit(do_not_specialize=["known"])
def _best_of_row(
    scores: tl.tensor,
    ids: tl.tensor,
    peaks: tl.tensor,
    slots: tl.tensor,
    latest: tl.tensor,
    out: tl.tensor,  # [rows, 2]
    known: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    is_in = i < CHUNKS
    _, where = tl.max(
        tl.load(scores + at * CHUNKS + i, mask=is_in, other=float("-inf")), 0, return_indices=True
    )  # the first among equals: the lowest id
    peak = tl.max(tl.load(peaks + at * CHUNKS + i, mask=is_in, other=float("-inf")), 0)
    token = tl.minimum(tl.load(ids + at * CHUNKS + where), known - 1)
    tl.store(out + 2 * at, token)
    tl.store(out + 2 * at + 1, ((peak == float("inf")) | (peak == float("-inf"))).to(tl.int32))
    tl.store(latest + tl.load(slots + at), token)


def floors(logits: torch.Tensor, rows: torch.Tensor, known: int) -> torch.Tensor:
    """float32 [S]: the least logit that each row may choose, -inf where nothing is cut off. Arguments as `sample`."""
    num_rows, width = logits.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _floors[(num_rows,)](logits, rows, out, width, known, rows.stride(0), SCAN=_SCAN, num_warps=16)
    return out


def sample(
    logits: torch.Tensor, rows: torch.Tensor, known: int, slots: torch.Tensor, latest: torch.Tensor
) -> torch.Tensor:
    """int32 [S, 2]: the token, and 1 where the row holds NaN, +inf or nothing but -inf.

    logits: float32 [S, V], contiguous; ids from `known` on are never chosen.
    rows: int32 [NUM_SAMPLING_FIELDS, S or more]. slots: int32 [S]; tokens are written there in int32 `latest`, too.
    """
    num_rows, width = logits.shape
    chunks = triton.cdiv(known, CHUNK)
    device = logits.device
    least = floors(logits, rows, known)
    scores, peaks = torch.empty(2, num_rows, chunks, dtype=torch.float32, device=device)
    ids = torch.empty(num_rows, chunks, dtype=torch.int32, device=device)
    out = torch.empty(num_rows, 2, dtype=torch.int32, device=device)
    stride = rows.stride(0)
    _best_of_chunk[(num_rows, chunks)](
        logits, rows, least, scores, ids, peaks, width, known, stride, SIZE=CHUNK, num_warps=8
    )
    _best_of_row[(num_rows,)](
        scores, ids, peaks, slots, latest, out, known,
        CHUNKS=chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return out
