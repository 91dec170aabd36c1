"""Plain torch on any device: short, slow and obviously right. The oracle by tolerance, never by bits (C4)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from models.batch import Batch
from models.ops.codes import check_codes, check_size, code_activations, round_int4, round_int8, split_codes
from models.ops.kernels import ACTIVATIONS, FORMATS, GATES, GROUP_SIZE, INT8_SPAN, LayerKV, PackedLinear


class ReferenceKernels:
    """Key and value layout: [num_blocks, block_size, num_kv_heads, head_size]."""

    name = "reference"
    is_exact: bool = False
    pack_height = 1

    def __init__(self, activation_dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        """device: where KV blocks are allocated; None = the CPU."""
        self.activation_dtype = activation_dtype
        self._device = device or torch.device("cpu")
        # Sums run in fp32 at least; a float64 instance is the oracle of the other two.
        self._wide = torch.promote_types(activation_dtype, torch.float32)

    def empty_packed(
        self, out_features: int, in_features: int, dtype: torch.dtype, format: str = "plain", has_offsets: bool = False
    ) -> PackedLinear:
        check_size(in_features, format)
        empty = functools.partial(torch.empty, device=self._device)
        if format == "plain":
            data = empty(out_features, in_features, dtype=self.activation_dtype)
            return PackedLinear(data, out_features, in_features, dtype)
        if format == "int8":
            data = empty(out_features, in_features, dtype=torch.int8)
            return PackedLinear(
                data, out_features, in_features, dtype, format, empty(out_features, dtype=torch.float32)
            )
        if format == "int4":
            data = empty(out_features, in_features // 2, dtype=torch.uint8)
            scales, offsets = (empty(out_features, in_features // GROUP_SIZE, dtype=torch.float16) for _ in range(2))
            kept = offsets if has_offsets else None
            return PackedLinear(data, out_features, in_features, dtype, format, scales, kept, has_offsets)
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")

    def pack_rows(self, packed: PackedLinear, first_row: int, rows: torch.Tensor) -> None:
        here = slice(first_row, first_row + len(rows))
        if packed.format == "int4":
            self.pack_codes(packed, first_row, *round_int4(rows))
        elif packed.scales is not None:
            packed.data[here], packed.scales[here] = round_int8(rows)
        else:
            packed.data[here] = rows

    def pack_codes(
        self,
        packed: PackedLinear,
        first_row: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
    ) -> None:
        check_codes(packed, codes, scales, offsets)
        for into, part in ((packed.data, codes), (packed.scales, scales), (packed.offsets, offsets)):
            if into is not None and part is not None:
                into[first_row : first_row + len(codes)] = part

    def pack(self, weight: torch.Tensor) -> PackedLinear:
        out_features, in_features = weight.shape
        packed = self.empty_packed(out_features, in_features, weight.dtype)
        self.pack_rows(packed, 0, weight)
        return packed

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if weight.format == "plain":
            out = F.linear(x, weight.data, None if bias is None else bias.to(x.dtype))
        else:
            wide = F.linear(self._as_coded(x, weight.format), self._values(weight))
            out = (wide if bias is None else wide + bias).to(x.dtype)
        return out if residual is None else residual.add_(out)

    def _as_coded(self, x: torch.Tensor, format: str) -> torch.Tensor:
        """The values that remain of x when it is quantised."""
        group = GROUP_SIZE if format == "int4" else INT8_SPAN
        codes, steps, _ = code_activations(x, group)
        return codes.to(self._wide) * steps.to(self._wide).repeat_interleave(group, dim=1)[:, : x.shape[1]]

    def _values(self, weight: PackedLinear) -> torch.Tensor:
        """[out, in], widened."""
        assert weight.scales is not None
        scales = weight.scales.to(self._wide)
        if weight.format == "int8":
            return weight.data.to(self._wide) * scales.unsqueeze(1)
        codes = split_codes(weight.data).to(self._wide).view(*scales.shape, GROUP_SIZE)
        offsets = -8 * scales if weight.offsets is None else weight.offsets.to(self._wide)
        return (codes * scales.unsqueeze(-1) + offsets.unsqueeze(-1)).flatten(1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(self._wide)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.to(self._wide)).to(self.activation_dtype)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        wide_bias = None if bias is None else bias.to(self._wide)
        out = F.layer_norm(x.to(self._wide), weight.shape, weight.to(self._wide), wide_bias, eps)
        return out.to(self.activation_dtype)

    def gate_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in GATES:
            raise ValueError(f"activation must be one of {', '.join(GATES)}; got {activation!r}")
        gate, up = gate_up.to(self._wide).chunk(2, dim=-1)
        return (_activated(gate, activation) * up).to(self.activation_dtype)

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        return _activated(x.to(self._wide), activation).to(self.activation_dtype)

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return x.div_(cap).tanh_().mul_(cap)

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
    ) -> list[LayerKV]:
        shape = (num_blocks, block_size, num_kv_heads, head_size)
        zeros = functools.partial(torch.zeros, shape, dtype=dtype, device=self._device)
        return [LayerKV(zeros(), zeros()) for _ in range(num_layers)]

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
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_size)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = self.rms_norm(q, q_norm, eps), self.rms_norm(k, k_norm, eps)
        if cos_sin is not None:
            angles = cos_sin[positions.long()].to(self._wide).unsqueeze(1)
            q, k = self._rotate(q, angles), self._rotate(k, angles)
        slots = slot_mapping.long()
        kv.key.view(-1, num_kv_heads, head_size)[slots] = k.to(kv.key.dtype)
        kv.value.view(-1, num_kv_heads, head_size)[slots] = v.to(kv.value.dtype)
        return q.to(self.activation_dtype).reshape(len(qkv), num_heads * head_size)

    def _rotate(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        cos, sin = angles.chunk(2, dim=-1)
        half = cos.shape[-1]
        x = x.to(self._wide)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

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
        wide, group = self._wide, num_heads // num_kv_heads
        out = torch.zeros(len(q), num_heads, head_size, dtype=wide, device=q.device)
        lse = torch.full((len(q), num_heads), -torch.inf, dtype=wide, device=q.device)
        block_size = kv.key.shape[1]
        starts, seq_lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for row, seq_len in enumerate(seq_lens):
            start, end = starts[row], starts[row + 1]
            if start == end:
                continue
            blocks = batch.block_table[row, : -(-seq_len // block_size)].long()
            keys = kv.key[blocks].flatten(0, 1)[:seq_len].to(wide).repeat_interleave(group, dim=1)
            values = kv.value[blocks].flatten(0, 1)[:seq_len].to(wide).repeat_interleave(group, dim=1)
            queries = q[start:end].to(wide).view(-1, num_heads, head_size)
            scores = torch.einsum("qhd,khd->qhk", queries, keys) * scale
            if softcap:
                scores = self.soft_cap(scores, softcap)
            query_pos = torch.arange(seq_len - (end - start), seq_len, device=q.device).view(-1, 1, 1)
            key_pos = torch.arange(seq_len, device=q.device)
            hidden = key_pos > query_pos
            if window:
                hidden |= key_pos <= query_pos - window
            scores = scores.masked_fill(hidden, -torch.inf)
            lse[start:end] = torch.logsumexp(scores, dim=-1)
            out[start:end] = torch.einsum("qhk,khd->qhd", torch.softmax(scores, dim=-1), values)
        return out.flatten(1).to(self.activation_dtype), lse.float()


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
