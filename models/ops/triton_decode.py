"""Decode attention in Triton: rows with one query each, their splits dealt out among however many programs there are.

A split is computed as in `triton_attention`, of the same length and folded in the same order, but by a tile of 16 query
rows: of its bandwidth an H200 reads 59 % with tiles of 64, and 86 % with tiles of 16 (128 rows of 2,048 keys). So a
row has the same bits in any batch of decodes; that it has them beside a prompt, too, was seen and is not promised. A
list of all rows' splits is shared among programs whose number depends on the device and the number of rows alone, and
the results lie one row after the other. So a launch depends on no length, and a CUDA graph of it serves any.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from models.batch import Batch
from models.ops import triton_attention
from models.ops.kernels import LayerKV
from models.ops.triton_attention import (
    attend_split,
    fold,
    is_native,
    num_keys,
    num_stages,
    row_of,
)  # fmt: skip

QUERY_ROWS = 16
WAVES = 8  # programs per multiprocessor that the splits are dealt out among
NUM_WARPS = 4
NUM_STAGES = 2
FOLD_HEADS = 2


@triton.jit(do_not_specialize=["num_rows", "table_width"])
def _decode(
    q: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    lengths: tl.tensor,
    split_starts: tl.tensor,
    table: tl.tensor,
    parts: tl.tensor,  # [splits of all rows, heads, BLOCK_D], like totals and bests
    totals: tl.tensor,
    bests: tl.tensor,
    num_rows: tl.tensor,
    table_width: tl.tensor,
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
) -> None:
    """Splits of rows with one query each, dealt out among however many programs there are."""
    head = tl.program_id(1)
    lane = tl.arange(0, QUERIES)
    is_query = lane < GROUP
    d = tl.arange(0, BLOCK_D)
    is_in = is_query[:, None] & (d < SIZE)[None, :]
    for item in range(tl.program_id(0), tl.load(split_starts + num_rows), tl.num_programs(0)):
        row = row_of(split_starts, num_rows, item, 1, 0)
        index = item - tl.load(split_starts + row)
        length = tl.load(lengths + row)
        position = length - 1
        low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else position * 0
        if index >= low // SPLIT_KEYS:
            output = row.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + lane
            queries = tl.load(q + output[:, None] * SIZE + d[None, :], mask=is_in, other=0.0)
            if WIDEN:
                queries = queries.to(tl.float32)
            blocks = table + row.to(tl.int64) * table_width
            part, total, best = attend_split(
                queries, lane * 0 + position, key, value, blocks, head, index, low, length,
                SCALE, WINDOW, SOFTCAP, KV_HEADS, SIZE, BLOCK_SIZE, QUERIES, BLOCK_D, KEYS, SPLIT_KEYS, WIDEN,
            )  # fmt: skip
            place = (lane * 0 + item).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + lane
            tl.store(parts + place[:, None] * BLOCK_D + d[None, :], part, mask=is_query[:, None])
            tl.store(totals + place, total, mask=is_query)
            tl.store(bests + place, best, mask=is_query)


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What all layers of a step without prompts share. Its shapes follow from the number of rows and the longest
    context that there could be, so a recorded launch serves any lengths up to that."""

    split_starts: torch.Tensor  # int32 [rows + 1], the number of splits before each row
    parts: torch.Tensor  # fp32 [splits, heads, block_d]
    totals: torch.Tensor  # fp32 [splits, heads]
    bests: torch.Tensor


def scratch(batch: Batch, num_tokens: int, num_heads: int, head_size: int, max_part_bytes: int) -> DecodeScratch | None:
    """The batch's, made for its first layer; None where this is no such batch, or its splits need more than
    max_part_bytes."""
    if batch.scratch is None:
        rows, block_d = len(batch.seq_lens), max(16, triton.next_power_of_2(head_size))
        max_num_splits = rows * triton.cdiv(batch.max_seq_len, triton_attention.SPLIT)
        is_one_each = batch.max_query_len == 1 and num_tokens == rows > 0
        if not is_one_each or max_num_splits * num_heads * (block_d + 2) * 4 > max_part_bytes:
            return None
        batch.scratch = _make_scratch(batch.seq_lens, max_num_splits, num_heads, block_d)
    assert isinstance(batch.scratch, DecodeScratch)
    return batch.scratch


def decode(
    q: torch.Tensor,
    kv: LayerKV,
    batch: Batch,
    scratch: DecodeScratch,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query per row, and no other tokens."""
    rows = len(q)
    out = torch.empty_like(q)
    lse = torch.empty(rows, num_heads, dtype=torch.float32, device=q.device)
    num_splits, _, block_d = scratch.parts.shape
    group = num_heads // num_kv_heads
    programs = min(num_splits, triton.cdiv(WAVES * _num_multiprocessors(q.device), num_kv_heads))
    _decode[(programs, num_kv_heads)](
        q,
        kv.key,
        kv.value,
        batch.seq_lens,
        scratch.split_starts,
        batch.block_table,
        scratch.parts,
        scratch.totals,
        scratch.bests,
        rows,
        batch.block_table.stride(0),
        SCALE=scale,
        WINDOW=window,
        SOFTCAP=softcap,
        GROUP=group,
        KV_HEADS=num_kv_heads,
        SIZE=head_size,
        BLOCK_SIZE=kv.key.shape[1],
        QUERIES=max(QUERY_ROWS, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        KEYS=num_keys(block_d),
        SPLIT_KEYS=triton_attention.SPLIT,
        WIDEN=not is_native(q, kv),
        num_warps=NUM_WARPS if block_d <= 128 else 8,
        num_stages=NUM_STAGES if block_d <= 128 and is_native(q, kv) else num_stages(q, kv, block_d),
        enable_fp_fusion=False,
    )
    fold[(rows, triton.cdiv(num_heads, FOLD_HEADS))](
        scratch.parts,
        scratch.totals,
        scratch.bests,
        scratch.split_starts,
        batch.seq_lens,
        out,
        lse,
        rows,
        num_splits,
        WINDOW=window,
        HEADS=num_heads,
        SIZE=head_size,
        BLOCK_D=block_d,
        SPLIT_KEYS=triton_attention.SPLIT,
        TILE=FOLD_HEADS,
        IS_DECODE=True,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return out, lse


def _make_scratch(seq_lens: torch.Tensor, max_num_splits: int, num_heads: int, block_d: int) -> DecodeScratch:
    split_starts = torch.zeros(len(seq_lens) + 1, dtype=torch.int32, device=seq_lens.device)
    torch.cumsum((seq_lens + (triton_attention.SPLIT - 1)) // triton_attention.SPLIT, 0, out=split_starts[1:])
    floats = functools.partial(torch.empty, dtype=torch.float32, device=seq_lens.device)
    totals, bests = floats(2, max_num_splits, num_heads)
    return DecodeScratch(split_starts, floats(max_num_splits, num_heads, block_d), totals, bests)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
