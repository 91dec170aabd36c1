"""Norms of heads, rotary positions and the store into the KV cache as one Triton kernel.

A program owns 32 heads, of one token or of neighbours, each of which depends on itself alone. Keys and values:
[num_blocks, block_size, num_kv_heads, head_size].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from models.ops.kernels import LayerKV

HEADS_PER_PROGRAM = 32


@triton.jit(do_not_specialize=["tokens"])
def _rope_store(
    qkv: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    slots: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    q: tl.tensor,
    tokens: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,  # of the rotated features; 0 = no rotation
    HAS_NORM: tl.constexpr,
    TILE: tl.constexpr,  # heads of a program
    BLOCK_D: tl.constexpr,
) -> None:
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_head = place < tokens * ALL
    token = place // ALL
    head = place % ALL
    d = tl.arange(0, BLOCK_D)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    is_feature = (d < SIZE)[None, :]
    is_in = is_head[:, None] & is_feature
    source = qkv + place[:, None] * SIZE
    x = tl.load(source + d[None, :], mask=is_in, other=0.0).to(tl.float32)
    stored = x
    # A feature and the one that it rotates with; those behind the rotated ones keep to themselves.
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    y = tl.load(source + partner[None, :], mask=is_in, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)
        x_of_q = tl.load(q_norm + d, mask=d < SIZE, other=0.0).to(tl.float32)
        x_of_k = tl.load(k_norm + d, mask=d < SIZE, other=0.0).to(tl.float32)
        y_of_q = tl.load(q_norm + partner, mask=d < SIZE, other=0.0).to(tl.float32)
        y_of_k = tl.load(k_norm + partner, mask=d < SIZE, other=0.0).to(tl.float32)
        x = x * scale[:, None] * tl.where(is_query[:, None], x_of_q[None, :], x_of_k[None, :])
        y = y * scale[:, None] * tl.where(is_query[:, None], y_of_q[None, :], y_of_k[None, :])
    if HALF > 0:
        position = tl.load(positions + token, mask=is_head, other=0).to(tl.int64)
        angle = position[:, None] * (2 * HALF) + tl.where(d < HALF, d, d - HALF)[None, :]
        is_turned = is_head[:, None] & (d < 2 * HALF)[None, :]
        cosine = tl.load(cos_sin + angle, mask=is_turned, other=1.0)
        sine = tl.load(cos_sin + HALF + angle, mask=is_turned, other=0.0)
        x = tl.where((d < HALF)[None, :], x * cosine - y * sine, x * cosine + y * sine)
    x = tl.where(is_value[:, None], stored, x)
    to_q = q + (token * HEADS + head)[:, None] * SIZE + d[None, :]
    tl.store(to_q, x.to(q.dtype.element_ty), mask=is_in & is_query[:, None])
    slot = tl.load(slots + token, mask=is_head, other=0).to(tl.int64)
    cell = (slot * KV_HEADS + head - HEADS)[:, None] * SIZE + d[None, :]
    tl.store(key + cell, x.to(key.dtype.element_ty), mask=is_in & (~is_query & ~is_value)[:, None])
    tl.store(value + cell - KV_HEADS * SIZE, x.to(value.dtype.element_ty), mask=is_in & is_value[:, None])


def rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    kv: LayerKV,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    q: torch.Tensor,
) -> torch.Tensor:
    """norms: (q_norm, k_norm, eps); q [tokens, num_heads * head_size] is filled and returned.

    Positions and slots are taken as true: checking them would wait for the device.
    """
    tokens = len(qkv)
    if not tokens:
        return q
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    programs = triton.cdiv(tokens * (num_heads + 2 * num_kv_heads), HEADS_PER_PROGRAM)
    _rope_store[(programs,)](
        qkv,
        positions,
        qkv if cos_sin is None else cos_sin,
        slot_mapping,
        q_norm,
        k_norm,
        kv.key,
        kv.value,
        q,
        tokens,
        eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        SIZE=head_size,
        HALF=0 if cos_sin is None else cos_sin.shape[1] // 2,
        HAS_NORM=norms is not None,
        TILE=HEADS_PER_PROGRAM,
        BLOCK_D=triton.next_power_of_2(head_size),
    )
    return q
