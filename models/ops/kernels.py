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
    """A weight [out_features, in_features] in the layout of the kernels that packed it.

    format: "plain" (floating point); "int8" (codes -127..127 with a scale per output); "int4" (codes 0..15
        in groups of GROUP_SIZE inputs with a scale and, unless they are symmetric around 8, an offset per
        group). Activations that meet integers are quantised to -127..127 as they come, with a scale per
        token and INT8_SPAN or GROUP_SIZE inputs.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype  # of the weight's values before quantisation
    format: str = "plain"
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    has_offsets: bool = False  # of int4; they and the scales may lie in `data`

    @property
    def num_bytes(self) -> int:
        """Of its values and scales without padding: what one multiplication must read."""
        num_values = self.out_features * self.in_features
        if self.format == "int8":
            return num_values + 4 * self.out_features
        if self.format == "int4":
            return num_values // 2 + num_values // GROUP_SIZE * (4 if self.has_offsets else 2)
        return num_values * self.data.itemsize


FORMATS = ("plain", "int8", "int4")
INT8_SPAN = 64  # inputs of a token that share a scale where they meet int8 weights
GROUP_SIZE = 32  # inputs that share a scale in int4, as in GGUF's Q4_0 and Q4_1

NUM_SAMPLING_FIELDS = 6  # parameters of a row that is sampled on a device (`models/ops/triton_sampling.py`)

GATES = ("silu", "gelu_tanh", "gelu")
ACTIVATIONS = ("relu", "gelu_tanh", "gelu", "silu")


class Kernels(Protocol):
    """Activations are 2-D [tokens, features], contiguous, of `activation_dtype`."""

    name: str  # enters the fingerprint: kernel set and ISA level
    is_exact: bool  # whether C4 is shown by tests for this set
    activation_dtype: torch.dtype
    pack_height: int  # strips given to `pack_rows` begin at a multiple of it

    def empty_packed(
        self, out_features: int, in_features: int, dtype: torch.dtype, format: str = "plain", has_offsets: bool = False
    ) -> PackedLinear:
        """Room for a weight, to be filled by `pack_rows` or `pack_codes`.

        Raises ValueError for a format or a size (int4: in_features not a multiple of GROUP_SIZE) that
        these kernels do not multiply.
        """
        ...

    def pack_rows(self, packed: PackedLinear, first_row: int, rows: torch.Tensor) -> None:
        """Repack `rows` [n, K] of a floating-point weight as outputs first_row, first_row + 1, …

        first_row is a multiple of pack_height. int8 and int4 are rounded to nearest here: a row's
        codes depend on that row alone.
        """
        ...

    def pack_codes(
        self,
        packed: PackedLinear,
        first_row: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
    ) -> None:
        """Repack stored int4 rows without any rounding.

        codes: uint8 [n, K / 2], input 2j in the low four bits and 2j + 1 in the high ones of byte j.
        scales, offsets: float16 [n, K / GROUP_SIZE]; a value is code * scale + offset, or (code - 8) *
            scale where offsets is None.
        """
        ...

    def pack(self, weight: torch.Tensor) -> PackedLinear:
        """Repack a whole floating-point weight [N, K] as "plain"."""
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

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """(x - mean) * rsqrt(variance + eps) * weight + bias over the last dimension, in fp32 (Ba et al. 2016)."""
        ...

    def gate_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """[M, 2I] -> [M, I]: activation(first half) * second half; `activation` is one of GATES."""
        ...

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Elementwise, a new tensor; `activation` is one of ACTIVATIONS.

        gelu is x Φ(x) by erf, gelu_tanh its approximation by tanh (Hendrycks & Gimpel 2016).
        """
        ...

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """cap * tanh(x / cap), in place (Gemma 2)."""
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
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """Rotate q and k, write k and v into their slots, return q [T, num_heads * head_size].

        q_norm, k_norm: [head_size], both or neither: RMS-normalise every head of q and k first (Qwen3, Gemma 3).
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
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of every query token over its row's paged context (C9).

        window: 0 = all; w = a token sees itself and the w - 1 tokens before it.
        softcap: 0 = none; c replaces every scaled score s by c * tanh(s / c) (Gemma 2).
        Returns (out [T, num_heads * head_size], lse float32 [T, num_heads]).
        """
        ...
