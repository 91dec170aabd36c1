"""Kernels for CUDA devices: Triton for what a decoder asks beside its linears, torch (cuBLAS) for those.

Where no GPU is, tests run the Triton kernels under its interpreter, on CPU tensors, and compile them for two
architectures; the same tests have passed on an H100 and an H200 (`docs/benchmarks.md`). Quantised linears are the
reference's: widened at every call, right but slow, and never run on a GPU.

`is_exact` is False: cuBLAS chooses a kernel, and with it the order of sums, by the number of rows, so a row's bits
depend on its batch (seen for three of ten shapes within 128 rows). The Triton kernels are written to be exact: every
program has one shape, whatever the batch.
"""

from __future__ import annotations

import math

import torch

from models.batch import Batch
from models.ops import triton_attention, triton_decode, triton_rope, triton_rows
from models.ops.kernels import ACTIVATIONS, GATES, LayerKV, PackedLinear
from models.ops.reference import ReferenceKernels


class TritonKernels(ReferenceKernels):
    """Key and value layout: [num_blocks, block_size, num_kv_heads, head_size], as the reference's."""

    name = "triton"
    max_part_bytes = 512 << 20
    """Of the results of splits; a step that needs more gives a program all splits of a tile."""

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if residual is None or bias is not None or weight.format != "plain":
            return super().linear(x, weight, bias, residual)
        return residual.addmm_(x, weight.data.t())  # one kernel, and the sum is rounded once

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return triton_rows.rms_norm(x.contiguous(), weight, eps, self._empty_like(x))

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return triton_rows.layer_norm(x.contiguous(), weight, bias, eps, self._empty_like(x))

    def gate_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in GATES:
            raise ValueError(f"activation must be one of {', '.join(GATES)}; got {activation!r}")
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2, dtype=self.activation_dtype)
        return triton_rows.gate_mul(gate_up.contiguous(), ACTIVATIONS.index(activation), out)

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        return triton_rows.activate(x.contiguous(), ACTIVATIONS.index(activation), self._empty_like(x))

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        if not x.is_contiguous():
            raise ValueError(f"x must be contiguous; got strides {x.stride()} of {list(x.shape)}")
        return triton_rows.soft_cap(x, cap)

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
        if (q_norm is None) != (k_norm is None):
            raise ValueError("q_norm and k_norm come both or not at all")
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm, eps)
        q = qkv.new_empty(len(qkv), num_heads * head_size, dtype=self.activation_dtype)
        heads = (num_heads, num_kv_heads, head_size)
        return triton_rope.rope_store(qkv.contiguous(), positions, cos_sin, kv, slot_mapping, *heads, norms, q)

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
        if window < 0 or not math.isfinite(scale) or not 0 <= softcap < math.inf:
            raise ValueError(
                "window must be at least 0, scale finite and softcap at least 0 and finite; "
                f"got {window}, {scale} and {softcap}"
            )
        heads, q = (num_heads, num_kv_heads, head_size), q.contiguous()
        scratch = triton_decode.scratch(batch, len(q), num_heads, head_size, self.max_part_bytes)
        if scratch is not None:
            return triton_decode.decode(q, kv, batch, scratch, *heads, scale, window, softcap)
        return triton_attention.attention(q, kv, batch, *heads, scale, window, softcap, self.max_part_bytes)

    def _empty_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.shape, dtype=self.activation_dtype, device=x.device)
