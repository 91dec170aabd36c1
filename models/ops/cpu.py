"""Our CPU kernels: fp32 activations, bf16 or fp32 weights and KV, bit-exact whatever the batch (C4).

Where the CPU multiplies bf16 (AVX512-BF16), a linear with bf16 weights rounds its input to bf16 and sums in fp32.

Every output element is one chain of sums whose order depends on its own row alone, so a row has the same bits alone, in
a batch of any size, in any chunk and on any number of threads (tests/models/ops). The C++ source is compiled when the
package is built, once per instruction set; this file takes the best that the machine can run and checks arguments.
"""

from __future__ import annotations

import functools
import importlib
import math
import types

import numpy as np
import torch

from models.batch import Batch
from models.ops.kernels import LayerKV, PackedLinear

PANEL = 32  # outputs per panel of a packed weight (cpu_linear.h)
MAX_HEAD_SIZE = 256

_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_F32 = torch.float32
_I32 = torch.int32


@functools.cache
def load_extension() -> types.ModuleType | None:
    """The extension of the best instruction set that was built and runs here; None if none was built."""
    try:
        baseline = importlib.import_module("models.ops._cpu_base")
    except ImportError:
        return None
    for name in baseline.variants():
        try:
            return importlib.import_module(f"models.ops.{name}")
        except ImportError:
            continue
    return baseline


def _format(tensor: torch.Tensor, what: str) -> int:
    try:
        return _FORMATS[tensor.dtype]
    except KeyError:
        raise ValueError(f"{what} must be float32 or bfloat16; got {tensor.dtype}") from None


def _refuse(what: str, wanted: str, tensor: torch.Tensor) -> ValueError:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return ValueError(f"{what} must be contiguous {wanted}; got {tensor.dtype} {list(tensor.shape)}{layout}")


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system provides when they are first written: gigabytes in no time.

    torch.zeros touches every page at once. Aligned to a cache line.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(num_bytes + 64, np.uint8))
    skip = -raw.data_ptr() % 64
    return raw[skip : skip + num_bytes].view(dtype).view(shape)


class Arena:
    """Memory that lives as long as what lies in it, on huge pages where the system grants them.

    A weight of its own is too small for pages of 2 MiB, and 4 KiB pages halve the rate at which weights are read
    (measured: 134M parameters in 13.4 ms by one thread, 9.2 ms from an arena).
    """

    CHUNK = 32 << 20
    _HUGE = 2 << 20

    def __init__(self, extension: types.ModuleType) -> None:
        self._advise_huge = extension.advise_huge
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, aligned to a cache line."""
        num_bytes = math.prod(shape) * dtype.itemsize
        size = -(-num_bytes // 64) * 64
        if size > len(self._free):
            room = -(-max(size, self.CHUNK) // self._HUGE) * self._HUGE
            raw = torch.empty(room + self._HUGE, dtype=torch.uint8)
            skip = -raw.data_ptr() % self._HUGE
            chunk = raw[skip : skip + room]
            self._advise_huge(chunk.data_ptr(), room)
            if room - size < len(self._free):  # what is left of the old chunk is worth more
                return chunk[:num_bytes].view(dtype).view(shape)
            self._free = chunk
        taken, self._free = self._free[:num_bytes], self._free[size:]
        return taken.view(dtype).view(shape)


class CpuKernels:
    """Key layout [blocks, kv_heads, head_size, block_size], value layout [blocks, kv_heads, block_size, head_size]."""

    is_exact = True
    activation_dtype = torch.float32
    pack_height = PANEL

    def __init__(self, extension: types.ModuleType | None = None) -> None:
        """Raises RuntimeError when the package was built without a compiler."""
        extension = extension or load_extension()
        if extension is None:
            raise RuntimeError(
                "the CPU kernels were not compiled: reinstall the package where a C++20 compiler is found"
            )
        self.name = extension.__name__.rpartition("._")[2].replace("_", "-")
        self.extension = extension
        self.rounds_activations: bool = extension.has_dot()  # to bf16, where they meet a bf16 weight
        self._arena = Arena(extension)
        self._linear = extension.linear
        self._rms_norm = extension.rms_norm
        self._silu_mul = extension.silu_mul
        self._rope_store = extension.rope_store
        self._attention = extension.attention

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of every kernel of this extension in this process (1 until set)."""
        self.extension.set_num_threads(num_threads)

    def empty_packed(
        self, out_features: int, in_features: int, dtype: torch.dtype, format: str = "plain", has_offsets: bool = False
    ) -> PackedLinear:
        """Any float type; bf16 stays bf16, everything else is stored as fp32 (fp16 widens exactly)."""
        if format != "plain":
            raise ValueError(f"{self.name} kernels multiply plain weights only; got {format!r}")
        stored = dtype if dtype is torch.bfloat16 else _F32
        is_paired = self.rounds_activations and stored is torch.bfloat16
        depth = in_features + in_features % 2 if is_paired else in_features
        data = self._arena.empty((-(-out_features // PANEL), depth, PANEL), stored)
        return PackedLinear(data, out_features, in_features, dtype)

    def pack_rows(self, packed: PackedLinear, first_row: int, rows: torch.Tensor) -> None:
        data = packed.data
        num_rows, width = rows.shape
        if first_row % PANEL or width != packed.in_features or first_row + num_rows > packed.out_features:
            raise ValueError(
                f"rows {first_row} to {first_row + num_rows} of {width} do not fit "
                f"[{packed.out_features}, {packed.in_features}] in panels of {PANEL}"
            )
        source = rows.to(data.dtype).contiguous()
        panel = data[first_row // PANEL :]
        self.extension.pack(source.data_ptr(), panel.data_ptr(), _FORMATS[data.dtype], num_rows, width)

    def pack_codes(
        self,
        packed: PackedLinear,
        first_row: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
    ) -> None:
        raise ValueError(f"{self.name} kernels multiply plain weights only; got {packed.format!r}")

    def pack(self, weight: torch.Tensor) -> PackedLinear:
        packed = self.empty_packed(*weight.shape, weight.dtype)
        self.pack_rows(packed, 0, weight)
        return packed

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        m, k = x.shape
        n = weight.out_features
        if k != weight.in_features or x.dtype is not _F32 or not x.is_contiguous():
            raise _refuse("x", f"float32 [tokens, {weight.in_features}]", x)
        if residual is None:
            out = torch.empty(m, n)
        else:
            out = residual
            if out.shape != (m, n) or out.dtype is not _F32 or not out.is_contiguous():
                raise _refuse("residual", f"float32 [{m}, {n}]", out)
        address = bias_format = 0
        if bias is not None:
            if bias.shape != (n,) or not bias.is_contiguous():
                raise _refuse("bias", f"[{n}]", bias)
            address, bias_format = bias.data_ptr(), _format(bias, "bias")
        data = weight.data
        self._linear(
            x.data_ptr(),
            data.data_ptr(),
            _FORMATS[data.dtype],
            address,
            bias_format,
            out.data_ptr(),
            residual is not None,
            m,
            n,
            k,
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows, n = x.shape
        if x.dtype is not _F32 or not x.is_contiguous():
            raise _refuse("x", "float32", x)
        if weight.shape != (n,) or not weight.is_contiguous():
            raise _refuse("weight", f"[{n}]", weight)
        out = torch.empty(rows, n)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), _format(weight, "weight"), out.data_ptr(), rows, n, eps)
        return out

    def gate_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation != "silu":
            raise ValueError(f"activation must be one of silu; got {activation!r}")
        rows, n = gate_up.shape
        if gate_up.dtype is not _F32 or not gate_up.is_contiguous() or n % 2:
            raise _refuse("gate_up", "float32 [tokens, 2 * intermediate]", gate_up)
        out = torch.empty(rows, n // 2)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, n // 2)
        return out

    def gather_rows(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """table [V, H], ids int32 [T] -> float32 [T, H]. Raises ValueError for an id outside the table."""
        if ids.dtype is not _I32 or ids.dim() != 1 or not ids.is_contiguous():
            raise _refuse("ids", "int32 [tokens]", ids)
        if table.dim() != 2 or not table.is_contiguous():
            raise _refuse("table", "[vocabulary, features]", table)
        rows, width = len(ids), table.shape[1]
        out = torch.empty(rows, width)
        self.extension.gather_rows(
            table.data_ptr(), _format(table, "table"), ids.data_ptr(), out.data_ptr(), rows, width, len(table)
        )
        return out

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
    ) -> list[LayerKV]:
        """Raises ValueError for a block size that is no multiple of 16, an odd or too large head, an unknown dtype."""
        if block_size < 1 or block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16; got {block_size}")
        if not 0 < head_size <= MAX_HEAD_SIZE or head_size % 2:
            raise ValueError(f"head_size must be even and at most {MAX_HEAD_SIZE}; got {head_size}")
        if dtype not in _FORMATS:
            raise ValueError(f"KV dtype must be float32 or bfloat16; got {dtype}")
        key, value = (
            (num_blocks, num_kv_heads, head_size, block_size),
            (num_blocks, num_kv_heads, block_size, head_size),
        )
        return [LayerKV(_untouched_zeros(key, dtype), _untouched_zeros(value, dtype)) for _ in range(num_layers)]

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
            raise _refuse("qkv", f"float32 [tokens, {(num_heads + 2 * num_kv_heads) * head_size}]", qkv)
        if kv_heads != num_kv_heads or size != head_size:
            raise ValueError(f"KV holds {kv_heads} heads of {size}; got {num_kv_heads} of {head_size}")
        if slot_mapping.dtype is not _I32 or slot_mapping.shape != (tokens,) or not slot_mapping.is_contiguous():
            raise _refuse("slot_mapping", f"int32 [{tokens}]", slot_mapping)
        if positions.dtype is not _I32 or positions.shape != (tokens,) or not positions.is_contiguous():
            raise _refuse("positions", f"int32 [{tokens}]", positions)
        table = half = max_positions = 0
        if cos_sin is not None:
            max_positions, rotary = cos_sin.shape
            if cos_sin.dtype is not _F32 or not cos_sin.is_contiguous() or rotary > head_size or rotary % 2:
                raise _refuse("cos_sin", f"float32 [positions, even, at most {head_size}]", cos_sin)
            table, half = cos_sin.data_ptr(), rotary // 2
        q = torch.empty(tokens, num_heads * head_size)
        self._rope_store(
            qkv.data_ptr(),
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            table,
            half,
            max_positions,
            key.data_ptr(),
            kv.value.data_ptr(),
            _FORMATS[key.dtype],
            block_size,
            num_blocks,
            tokens,
            num_heads,
            num_kv_heads,
            head_size,
            q.data_ptr(),
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
            raise _refuse("q", f"float32 [tokens, {num_heads * head_size}]", q)
        if kv_heads != num_kv_heads or size != head_size or num_heads % num_kv_heads:
            raise ValueError(f"KV holds {kv_heads} heads of {size}; got {num_heads} over {num_kv_heads} of {head_size}")
        if starts.dtype is not _I32 or len(starts) != rows + 1 or not starts.is_contiguous():
            raise _refuse("query_start_loc", f"int32 [{rows + 1}]", starts)
        if lengths.dtype is not _I32 or len(lengths) != rows or not lengths.is_contiguous():
            raise _refuse("seq_lens", f"int32 [{rows}]", lengths)
        if table.dtype is not _I32 or not table.is_contiguous():
            raise _refuse("block_table", "int32 [rows, width]", table)
        if window < 0 or not math.isfinite(scale):
            raise ValueError(f"window must be at least 0 and scale finite; got {window} and {scale}")
        out = torch.empty(tokens, width)
        lse = torch.empty(tokens, num_heads)
        self._attention(
            q.data_ptr(),
            key.data_ptr(),
            kv.value.data_ptr(),
            _FORMATS[key.dtype],
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
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse
