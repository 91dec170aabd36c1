"""The kernel seam: everything a decoder layer asks of a device, beside plain torch indexing.

Three implementations share these signatures and their tests: `reference` (plain torch, the oracle
by tolerance), `cpu` (our C++ kernels, exact in the sense of C4), `tiled` (torch with fixed shapes,
for machines without a compiler). Layers receive a `Kernels` object; nobody looks one up globally.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from models.batch import Batch


@dataclasses.dataclass(slots=True)
class LayerKV:
    """Keys and values of one layer. The layout belongs to the kernels that allocated it (C8)."""

    key: torch.Tensor
    value: torch.Tensor


@dataclasses.dataclass(slots=True)
class PackedLinear:
    """A weight [out_features, in_features] in the layout of the kernels that packed it."""

    data: torch.Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype  # of the weight's values


class Kernels(Protocol):
    """Activations are 2-D [tokens, features], contiguous, of `activation_dtype`."""

    name: str  # enters the fingerprint: kernel set and ISA level
    is_exact: bool  # whether C4 is shown by tests for this set
    activation_dtype: torch.dtype

    def pack(self, weight: torch.Tensor) -> PackedLinear:
        """Repack weight [N, K] once, at load."""
        ...

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, K] -> [M, N]. With `residual` [M, N] the result is added to it in place and returned."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x * rsqrt(mean(x², -1) + eps) * weight, reduced in fp32 (Zhang & Sennrich 2019)."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[M, 2I] -> [M, I]: silu(first half) * second half."""
        ...

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
    ) -> list[LayerKV]:
        """Zeroed KV blocks of `num_layers` layers."""
        ...

    def rope_store(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        kv: LayerKV,
        slot_mapping: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
    ) -> torch.Tensor:
        """Rotate q and k, write k and v into their slots, return q [T, num_heads * head_size].

        qkv: [T, (num_heads + 2 * num_kv_heads) * head_size], fused projections in that order.
        cos_sin: float32 [max_positions, rotary_dim]: cos of the rotary_dim / 2 frequencies, then
            sin (NeoX pairing: element i rotates with i + rotary_dim / 2); None = no rotation.
        """
        ...

    def attention(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        batch: Batch,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        window: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of every query token over its row's paged context (C9).

        window: 0 = all; w = a token sees itself and the w - 1 tokens before it.
        Returns (out [T, num_heads * head_size], lse float32 [T, num_heads]).
        """
        ...
