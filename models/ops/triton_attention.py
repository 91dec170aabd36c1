"""Paged causal attention in Triton: decodes, chunks and mixtures in one launch, with the bits of each alone (C4, C9).

A tile is 64 query rows: neighbouring tokens of one batch row times the query heads that share a KV head. It has that
size for a decode, too, where most of it is empty: at one query per row memory is the bound, and the shape of a product
is part of its bits. As on the CPU, positions are cut into splits of SPLIT keys and those into tiles, walked left to
right by online softmax (Milakov & Gimelshein 2018); splits are folded left to right in the same way, either by the
program that walks them all or, where each split has a program of its own (split-KV, Dao et al. 2023, with a fixed
length), by a second kernel. Which of the two runs can not change a bit: contraction is off, and an FMA stands where it
is written. What a query does not see is an exact no-op: probability 0, factor exp(0) = 1.

tests/models/ops/test_triton_attention.py holds all of this on a GPU, or else under Triton's interpreter. On an H100 and
an H200 a row of a product did not depend on its place in the tile, on the latter not even on whether the tile has 16
rows (`triton_decode`) or 64; and fp32, three products of TF32 there, was within 2e-5 of the oracle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from models.batch import Batch
from models.ops.kernels import LayerKV
from models.ops.triton_rows import tanh

QUERY_ROWS = 64
SPLIT = 256  # keys
MAX_SPLIT_TILES = 512


@triton.jit
def row_of(
    starts: tl.tensor, num_rows: tl.tensor, wanted: tl.tensor, STEP: tl.constexpr, GAP: tl.constexpr
) -> tl.tensor:
    """The last row r with starts[r] // STEP + r * GAP <= wanted."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // STEP + middle * GAP <= wanted:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def factors(best: tl.tensor, fresh_best: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The new maximum, and what sums under the old one and under the fresh one are multiplied by."""
    now = tl.maximum(best, fresh_best)
    base = tl.where(now == float("-inf"), 0.0, now)
    return now, tl.exp(best - base), tl.exp(fresh_best - base)


@triton.jit
def attend_split(
    q: tl.tensor,  # [QUERIES, BLOCK_D]
    query_pos: tl.tensor,  # [QUERIES]
    key: tl.tensor,
    value: tl.tensor,
    blocks: tl.tensor,  # the row's block ids
    head: tl.tensor,
    index: tl.tensor,
    low: tl.tensor,  # first key that any query of the tile sees
    end: tl.tensor,  # behind the last one
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Softmax over one split from nothing: weighted values [QUERIES, BLOCK_D], sums and maxima [QUERIES]."""
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    is_feature = d < SIZE
    begin = tl.maximum(index * SPLIT_KEYS, low // KEYS * KEYS)
    stop = tl.minimum((index + 1) * SPLIT_KEYS, end)
    for start in range(begin, stop, KEYS):
        key_pos = start + tl.arange(0, KEYS)
        is_key = (key_pos >= low) & (key_pos < end)  # anything may lie elsewhere, and 0 * NaN is not 0
        block = tl.load(blocks + key_pos // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        cell = ((block * BLOCK_SIZE + key_pos % BLOCK_SIZE) * KV_HEADS + head) * SIZE
        keys = tl.load(key + cell[None, :] + d[:, None], mask=is_key[None, :] & is_feature[:, None], other=0.0)
        values = tl.load(value + cell[:, None] + d[None, :], mask=is_key[:, None] & is_feature[None, :], other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(q, keys, input_precision="tf32x3") * SCALE
        if SOFTCAP > 0:
            scores = SOFTCAP * tanh(scores / SOFTCAP)
        is_seen = is_key[None, :] & (key_pos[None, :] <= query_pos[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (key_pos[None, :] > query_pos[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        now = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - base[:, None])
        factor = tl.exp(best - base)
        total = tl.fma(total, factor, tl.sum(weights, 1))
        mixed = tl.dot(weights.to(values.dtype), values, acc=mixed * factor[:, None], input_precision="tf32x3")
        best = now
    return mixed, total, best


@triton.jit(do_not_specialize=["num_rows", "table_width", "num_splits"])
def _attend(
    q: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,  # IS_SPLIT: [tokens, heads, splits, BLOCK_D], like total and best
    total_out: tl.tensor,
    best_out: tl.tensor,  # the lse unless IS_SPLIT
    num_rows: tl.tensor,
    table_width: tl.tensor,
    num_splits: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
) -> None:
    HEIGHT: tl.constexpr = QUERIES // GROUP  # tokens of a tile
    tile = tl.program_id(0)
    head = tl.program_id(1)
    # Row r begins at tile starts[r] // HEIGHT + r, which leaves room for all of its queries and needs no plan.
    row = row_of(starts, num_rows, tile, HEIGHT, 1)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    first = (tile - start // HEIGHT - row) * HEIGHT
    if first >= count:
        return
    length = tl.load(lengths + row)
    position = length - count + first
    end = tl.minimum(position + HEIGHT, length)
    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else position * 0
    first_split = low // SPLIT_KEYS
    end_split = (end - 1) // SPLIT_KEYS + 1
    if IS_SPLIT:
        first_split = tl.maximum(first_split, tl.program_id(2))
        end_split = tl.minimum(end_split, tl.program_id(2) + 1)
        if first_split >= end_split:
            return

    lane = tl.arange(0, QUERIES)
    query = first + lane // GROUP
    is_query = (lane < HEIGHT * GROUP) & (query < count)
    query_pos = position + lane // GROUP
    output = (start + query).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + lane % GROUP
    d = tl.arange(0, BLOCK_D)
    is_in = is_query[:, None] & (d < SIZE)[None, :]
    queries = tl.load(q + output[:, None] * SIZE + d[None, :], mask=is_in, other=0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    blocks = table + row.to(tl.int64) * table_width

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for index in range(first_split, end_split):
        part, part_total, part_best = attend_split(
            queries, query_pos, key, value, blocks, head, index, low, end,
            SCALE, WINDOW, SOFTCAP, KV_HEADS, SIZE, BLOCK_SIZE, QUERIES, BLOCK_D, KEYS, SPLIT_KEYS, WIDEN,
        )  # fmt: skip
        if IS_SPLIT:
            place = output * num_splits + index
            tl.store(out + place[:, None] * BLOCK_D + d[None, :], part, mask=is_query[:, None])
            tl.store(total_out + place, part_total, mask=is_query)
            tl.store(best_out + place, part_best, mask=is_query)
        else:
            now, old, fresh = factors(best, part_best)
            mixed = tl.fma(part, tl.broadcast_to(fresh[:, None], part.shape), mixed * old[:, None])
            total = tl.fma(part_total, fresh, total * old)
            best = now
    if not IS_SPLIT:
        result = mixed / total[:, None]
        tl.store(out + output[:, None] * SIZE + d[None, :], result.to(out.dtype.element_ty), mask=is_in)
        tl.store(best_out + output, best + tl.log(total), mask=is_query)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def fold(
    parts: tl.tensor,
    totals: tl.tensor,
    bests: tl.tensor,
    starts: tl.tensor,  # of each row's tokens; IS_DECODE: of its splits
    lengths: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TILE: tl.constexpr,
    IS_DECODE: tl.constexpr,
) -> None:
    """The splits of one token and TILE of its heads, left to right."""
    token = tl.program_id(0)
    if IS_DECODE:
        position = tl.load(lengths + token) - 1
    else:
        row = row_of(starts, num_rows, token, 1, 0)
        end = tl.load(starts + row + 1)
        if token >= end:  # padding behind the last row
            return
        position = tl.load(lengths + row) - (end - token)
    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else position * 0
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_head = head < HEADS
    output = token.to(tl.int64) * HEADS + head
    if IS_DECODE:
        first_place = tl.load(starts + token).to(tl.int64) * HEADS + head
        stride = HEADS
    else:
        first_place = output * num_splits
        stride = 1
    d = tl.arange(0, BLOCK_D)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, BLOCK_D], tl.float32)
    for index in range(low // SPLIT_KEYS, position // SPLIT_KEYS + 1):
        place = first_place + index * stride
        part = tl.load(parts + place[:, None] * BLOCK_D + d[None, :], mask=is_head[:, None], other=0.0)
        now, old, fresh = factors(best, tl.load(bests + place, mask=is_head, other=0.0))
        mixed = tl.fma(part, tl.broadcast_to(fresh[:, None], part.shape), mixed * old[:, None])
        total = tl.fma(tl.load(totals + place, mask=is_head, other=1.0), fresh, total * old)
        best = now
    result = mixed / total[:, None]
    is_in = is_head[:, None] & (d < SIZE)[None, :]
    tl.store(out + output[:, None] * SIZE + d[None, :], result.to(out.dtype.element_ty), mask=is_in)
    tl.store(lse + output, best + tl.log(total), mask=is_head)


def attention(
    q: torch.Tensor,
    kv: LayerKV,
    batch: Batch,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    scale: float,
    window: int,
    softcap: float,
    max_part_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in `Kernels`. A program per split where their results fit into max_part_bytes, else one for all.

    The plan is taken as true: checking it would wait for the device.
    """
    tokens, rows = len(q), len(batch.seq_lens)
    out = torch.zeros_like(q)
    lse = torch.full((tokens, num_heads), -torch.inf, dtype=torch.float32, device=q.device)
    if not tokens or not rows:
        return out, lse
    group = num_heads // num_kv_heads
    queries = max(QUERY_ROWS, triton.next_power_of_2(group))
    block_d = max(16, triton.next_power_of_2(head_size))
    num_splits = triton.cdiv(batch.max_seq_len, SPLIT)
    places = tokens * num_heads * num_splits
    # Enough tiles fill the device by themselves.
    has_few_tiles = tokens // (queries // group) * num_kv_heads < MAX_SPLIT_TILES
    is_split = num_splits > 1 and has_few_tiles and places * (block_d + 2) * 4 <= max_part_bytes
    parts, totals, bests = out, lse, lse
    if is_split:
        parts = torch.empty(places, block_d, dtype=torch.float32, device=q.device)
        totals, bests = torch.empty(2, places, dtype=torch.float32, device=q.device)
    tiles = tokens // (queries // group) + rows
    _attend[(tiles, num_kv_heads, num_splits if is_split else 1)](
        q,
        kv.key,
        kv.value,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        parts,
        totals,
        bests,
        rows,
        batch.block_table.shape[1],
        num_splits,
        SCALE=scale,
        WINDOW=window,
        SOFTCAP=softcap,
        GROUP=group,
        KV_HEADS=num_kv_heads,
        SIZE=head_size,
        BLOCK_SIZE=kv.key.shape[1],
        QUERIES=queries,
        BLOCK_D=block_d,
        KEYS=num_keys(block_d),
        SPLIT_KEYS=SPLIT,
        WIDEN=not is_native(q, kv),
        IS_SPLIT=is_split,
        num_warps=4 if block_d <= 128 else 8,
        num_stages=num_stages(q, kv, block_d),
        enable_fp_fusion=False,
    )
    if is_split:
        height = min(16, triton.next_power_of_2(num_heads))
        fold[(tokens, triton.cdiv(num_heads, height))](
            parts,
            totals,
            bests,
            batch.query_start_loc,
            batch.seq_lens,
            out,
            lse,
            rows,
            num_splits,
            WINDOW=window,
            HEADS=num_heads,
            SIZE=head_size,
            BLOCK_D=block_d,
            SPLIT_KEYS=SPLIT,
            TILE=height,
            IS_DECODE=False,
            enable_fp_fusion=False,
        )
    return out, lse


def is_native(q: torch.Tensor, kv: LayerKV) -> bool:
    """Products of 16-bit values are native, all others fp32."""
    if triton.knobs.runtime.interpret and q.dtype is torch.bfloat16:
        return False  # the interpreter would multiply the bit patterns of bf16
    return q.dtype is kv.key.dtype and q.dtype.itemsize == 2


def num_keys(block_d: int) -> int:
    """Of a tile."""
    return 64 if block_d <= 128 else 32


def num_stages(q: torch.Tensor, kv: LayerKV, block_d: int) -> int:
    """Tiles of keys and values that are on their way: what shared memory holds beside the queries."""
    return 2 if block_d <= 128 or is_native(q, kv) else 1
