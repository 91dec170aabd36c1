"""The kernels that touch the KV cache: rotary positions with the store of keys and values, and paged attention."""

from __future__ import annotations

import math
import types

import torch

from models.batch import Batch
from models.ops.cpu_tensors import FORMATS, format_of, refuse, untouched_zeros
from models.ops.kernels import LayerKV

MAX_HEAD_SIZE = 256

_F32 = torch.float32
_I32 = torch.int32


class PagedAttention:
    """Key layout [blocks, kv_heads, head_size, block_size], value layout [blocks, kv_heads, block_size, head_size]."""

    extension: types.ModuleType

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
    ) -> list[LayerKV]:
        """Raises ValueError for a block size that is no multiple of 16, an odd or too large head, an unknown dtype."""
        if block_size < 1 or block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16; got {block_size}")
        if not 0 < head_size <= MAX_HEAD_SIZE or head_size % 2:
            raise ValueError(f"head_size must be even and at most {MAX_HEAD_SIZE}; got {head_size}")
        if dtype not in FORMATS:
            raise ValueError(f"KV dtype must be float32, bfloat16 or float16; got {dtype}")
        key, value = (
            (num_blocks, num_kv_heads, head_size, block_size),
            (num_blocks, num_kv_heads, block_size, head_size),
        )
        return [LayerKV(untouched_zeros(key, dtype), untouched_zeros(value, dtype)) for _ in range(num_layers)]

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
        tokens, width = qkv.shape
        key = kv.key
        num_blocks, kv_heads, size, block_size = key.shape
        if width != (num_heads + 2 * num_kv_heads) * head_size or qkv.dtype is not _F32 or not qkv.is_contiguous():
            raise refuse("qkv", f"float32 [tokens, {(num_heads + 2 * num_kv_heads) * head_size}]", qkv)
        if kv_heads != num_kv_heads or size != head_size:
            raise ValueError(f"KV holds {kv_heads} heads of {size}; got {num_kv_heads} of {head_size}")
        if slot_mapping.dtype is not _I32 or slot_mapping.shape != (tokens,) or not slot_mapping.is_contiguous():
            raise refuse("slot_mapping", f"int32 [{tokens}]", slot_mapping)
        if positions.dtype is not _I32 or positions.shape != (tokens,) or not positions.is_contiguous():
            raise refuse("positions", f"int32 [{tokens}]", positions)
        addresses, formats = [0, 0], [0, 0]
        if q_norm is not None or k_norm is not None:
            for i, (what, norm) in enumerate((("q_norm", q_norm), ("k_norm", k_norm))):
                if norm is None:
                    raise ValueError("q_norm and k_norm come both or not at all")
                if norm.shape != (head_size,) or not norm.is_contiguous():
                    raise refuse(what, f"[{head_size}]", norm)
                addresses[i], formats[i] = norm.data_ptr(), format_of(norm, what)
        table = half = max_positions = 0
        if cos_sin is not None:
            max_positions, rotary = cos_sin.shape
            if cos_sin.dtype is not _F32 or not cos_sin.is_contiguous() or rotary > head_size or rotary % 2:
                raise refuse("cos_sin", f"float32 [positions, even, at most {head_size}]", cos_sin)
            table, half = cos_sin.data_ptr(), rotary // 2
        q = torch.empty(tokens, num_heads * head_size)
        self.extension.rope_store(
            qkv.data_ptr(),
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            table,
            half,
            max_positions,
            key.data_ptr(),
            kv.value.data_ptr(),
            FORMATS[key.dtype],
            block_size,
            num_blocks,
            tokens,
            num_heads,
            num_kv_heads,
            head_size,
            q.data_ptr(),
            addresses[0],
            formats[0],
            addresses[1],
            formats[1],
            eps,
        )
        return q

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
        tokens, width = q.shape
        key, table = kv.key, batch.block_table
        num_blocks, kv_heads, size, block_size = key.shape
        rows, table_width = table.shape
        starts, lengths = batch.query_start_loc, batch.seq_lens
        if width != num_heads * head_size or q.dtype is not _F32 or not q.is_contiguous():
            raise refuse("q", f"float32 [tokens, {num_heads * head_size}]", q)
        if kv_heads != num_kv_heads or size != head_size or num_heads % num_kv_heads:
            raise ValueError(f"KV holds {kv_heads} heads of {size}; got {num_heads} over {num_kv_heads} of {head_size}")
        if starts.dtype is not _I32 or len(starts) != rows + 1 or not starts.is_contiguous():
            raise refuse("query_start_loc", f"int32 [{rows + 1}]", starts)
        if lengths.dtype is not _I32 or len(lengths) != rows or not lengths.is_contiguous():
            raise refuse("seq_lens", f"int32 [{rows}]", lengths)
        if table.dtype is not _I32 or not table.is_contiguous():
            raise refuse("block_table", "int32 [rows, width]", table)
        if window < 0 or not math.isfinite(scale):
            raise ValueError(f"window must be at least 0 and scale finite; got {window} and {scale}")
        if not 0 <= softcap < math.inf:
            raise ValueError(f"softcap must be at least 0 and finite; got {softcap}")
        out = torch.empty(tokens, width)
        lse = torch.empty(tokens, num_heads)
        self.extension.attention(
            q.data_ptr(),
            key.data_ptr(),
            kv.value.data_ptr(),
            FORMATS[key.dtype],
            starts.data_ptr(),
            lengths.data_ptr(),
            table.data_ptr(),
            rows,
            table_width,
            tokens,
            num_heads,
            num_kv_heads,
            head_size,
            block_size,
            num_blocks,
            scale,
            window,
            softcap,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse
