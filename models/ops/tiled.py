"""Torch with fixed shapes: serves on CPU where the package was built without a compiler (C4).

A GEMM's bits depend on its shape, so every product here has one shape: linears take blocks of 16 rows, attention takes
16 queries against 128 keys, both padded with zeros, and a query sits in its tile where its position puts it.
Activations take blocks of 4096 values: torch's vectors and its loop over what is left behind them differ (measured: in
4 % of all values of silu, in 33 % of gelu).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from models.batch import Batch
from models.ops.codes import code_activations, split_codes
from models.ops.kernels import GATES, GROUP_SIZE, INT8_SPAN, LayerKV, PackedLinear
from models.ops.reference import ReferenceKernels

ROWS = 16  # of a linear's block, and queries of an attention tile
KEYS = 128  # keys of an attention tile
VALUES = 4096  # of an elementwise block: whole vectors, and too few for torch to share among threads


class TiledKernels(ReferenceKernels):
    """The reference with its matrix products cut into blocks of constant shape; fp32 throughout."""

    name = "tiled"

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.is_exact = True

    def empty_packed(
        self, out_features: int, in_features: int, dtype: torch.dtype, format: str = "plain", has_offsets: bool = False
    ) -> PackedLinear:
        """Turns `is_exact` off if, on this machine, a row's bits depend on its place in a block.

        That is the BLAS's business and differs between machines and shapes, so every weight is tried with equal rows.
        Sums of products of codes over a group are integers that fp32 holds exactly, in any order.
        """
        packed = super().empty_packed(out_features, in_features, dtype, format, has_offsets)
        if format != "plain":
            return packed
        row = torch.cos(torch.arange(in_features, dtype=torch.float32))
        out = F.linear(row.repeat(ROWS, 1), row.expand_as(packed.data))
        self.is_exact = self.is_exact and torch.equal(out, out[:1].expand_as(out))
        return packed

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if weight.format != "plain":
            out = self._multiply_int8(x, weight) if weight.format == "int8" else self._multiply_int4(x, weight)
            if bias is not None:
                out += bias.float()
            return out if residual is None else residual.add_(out)
        rows = len(x)
        padded = F.pad(x, (0, 0, 0, -rows % ROWS))
        wide_bias = None if bias is None else bias.float()
        blocks = [F.linear(block, weight.data, wide_bias) for block in padded.split(ROWS)]  # type: ignore[no-untyped-call]
        out = torch.cat(blocks)[:rows] if blocks else x.new_zeros(0, weight.out_features)
        return out if residual is None else residual.add_(out)

    def _multiply_int8(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """Span by span, in order."""
        assert weight.scales is not None
        codes, steps, _ = code_activations(x, INT8_SPAN)
        total = torch.zeros(len(x), weight.out_features)
        for g in range(steps.shape[1]):
            here = slice(g * INT8_SPAN, (g + 1) * INT8_SPAN)
            total += F.linear(codes[:, here].float(), weight.data[:, here].float()) * steps[:, g : g + 1]
        return total * weight.scales

    def _multiply_int4(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """Group by group, in order."""
        assert weight.scales is not None
        codes, steps, sums = code_activations(x, GROUP_SIZE)
        scales = weight.scales.float()
        offsets = None if weight.offsets is None else weight.offsets.float()
        values = split_codes(weight.data).float()
        if offsets is None:
            values -= 8
        total = torch.zeros(len(x), weight.out_features)
        wide = codes.float()
        for g in range(weight.in_features // GROUP_SIZE):
            here, step = slice(g * GROUP_SIZE, (g + 1) * GROUP_SIZE), steps[:, g : g + 1]
            total += F.linear(wide[:, here], values[:, here]) * (step * scales[:, g])
            if offsets is not None:
                total += step * sums[:, g : g + 1] * offsets[:, g]
        return total

    def gate_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in GATES:
            raise ValueError(f"activation must be one of {', '.join(GATES)}; got {activation!r}")
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activate(gate, activation).mul_(up)

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        activated = super().activate
        blocks = F.pad(x.flatten(), (0, -x.numel() % VALUES)).view(-1, VALUES)
        out = [activated(block, activation) for block in blocks]
        return torch.cat(out)[: x.numel()].view(x.shape) if out else x.clone()

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
        out = torch.zeros(len(q), num_heads, head_size)
        lse = torch.full((len(q), num_heads), -torch.inf)
        heads = q.view(-1, num_kv_heads, num_heads // num_kv_heads, head_size) * scale
        starts, seq_lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for row, seq_len in enumerate(seq_lens):
            first_position = seq_len - (starts[row + 1] - starts[row])
            position = first_position
            while position < seq_len:
                end = min(seq_len, position // ROWS * ROWS + ROWS)
                here = slice(starts[row] + position - first_position, starts[row] + end - first_position)
                out[here], lse[here] = self._tile(heads[here], kv, batch.block_table[row], position, window, softcap)
                position = end
        return out.flatten(1), lse

    def _tile(
        self,
        queries: torch.Tensor,
        kv: LayerKV,
        block_ids: torch.Tensor,
        position: int,
        window: int,
        softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Online softmax of up to 16 queries [n, kv_heads, group, D] at `position`, key tiles left to right."""
        count, kv_heads, group, size = queries.shape
        place = position % ROWS
        tile = queries.new_zeros(kv_heads, ROWS, group, size)
        tile[:, place : place + count] = queries.transpose(0, 1)
        tile = tile.view(kv_heads, ROWS * group, size)
        query_pos = torch.arange(position - place, position - place + ROWS).repeat_interleave(group).view(-1, 1)
        best = torch.full((kv_heads, ROWS * group, 1), -torch.inf)
        total = torch.zeros(kv_heads, ROWS * group, 1)
        mixed = torch.zeros(kv_heads, ROWS * group, size)
        block_size = kv.key.shape[1]
        step = block_size * max(1, KEYS // block_size)
        end = position + count
        for start in range(max(0, position - window + 1) // step * step if window else 0, end, step):
            ids = block_ids[start // block_size : (min(end, start + step) - 1) // block_size + 1].long()
            ids = F.pad(ids, (0, step // block_size - len(ids)))
            key_pos = torch.arange(start, start + step)
            unseen = (key_pos >= end).view(1, -1, 1)
            keys = kv.key[ids].flatten(0, 1).transpose(0, 1).float()
            values = kv.value[ids].flatten(0, 1).transpose(0, 1).float().masked_fill(unseen, 0.0)
            hidden = key_pos > query_pos
            if window:
                hidden |= key_pos <= query_pos - window
            scores = torch.bmm(tile, keys.transpose(1, 2))
            if softcap:
                scores = self.soft_cap(scores, softcap)
            scores = scores.masked_fill(hidden, -torch.inf)
            now = torch.maximum(best, scores.amax(-1, keepdim=True))
            base = now.masked_fill(now == -torch.inf, 0.0)
            probabilities = torch.exp(scores - base)
            factor = torch.exp(best - base)
            total = total * factor + probabilities.sum(-1, keepdim=True)
            mixed = mixed * factor + torch.bmm(probabilities, values)
            best = now
        out = (mixed / total).view(kv_heads, ROWS, group, size)[:, place : place + count].transpose(0, 1)
        lse = (best + total.log()).view(kv_heads, ROWS, group)[:, place : place + count].transpose(0, 1)
        return out.flatten(1, 2), lse.flatten(1)
