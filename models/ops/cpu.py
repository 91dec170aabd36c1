"""Our CPU kernels: fp32 activations, bf16, fp16 or fp32 weights and KV, bit-exact whatever the batch (C4).

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

import torch

from models.ops.codes import check_codes, check_size, round_int4, round_int8
from models.ops.cpu_attention import PagedAttention
from models.ops.cpu_tensors import FORMATS, Arena, format_of, refuse
from models.ops.kernels import ACTIVATIONS, GATES, GROUP_SIZE, PackedLinear

PANEL = 32  # outputs per panel of a packed weight (cpu_linear.h)
_GROUP_BYTES = 512  # codes of a panel and group of inputs; scales and offsets follow (cpu_int4.h)
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


class CpuKernels(PagedAttention):
    """Linears and kernels that treat every row alone; `PagedAttention` has those that touch the KV cache."""

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
        self._linear_codes = extension.linear_codes
        self._rms_norm = extension.rms_norm
        self._gate_mul = extension.gate_mul
        self._activate = extension.activate

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of every kernel of this extension in this process (1 until set)."""
        self.extension.set_num_threads(num_threads)

    def empty_packed(
        self, out_features: int, in_features: int, dtype: torch.dtype, format: str = "plain", has_offsets: bool = False
    ) -> PackedLinear:
        """Any float type; bf16 and fp16 stay what they are, everything else is stored as fp32."""
        check_size(in_features, format)
        panels = -(-out_features // PANEL)
        if format == "plain":
            stored = dtype if dtype in FORMATS else _F32
            is_paired = self.rounds_activations and stored is torch.bfloat16
            depth = in_features + in_features % 2 if is_paired else in_features
            return PackedLinear(self._arena.empty((panels, depth, PANEL), stored), out_features, in_features, dtype)
        if format == "int8":
            data = self._arena.empty((panels, -(-in_features // 4), PANEL * 4), torch.uint8)
            return PackedLinear(data, out_features, in_features, dtype, format, scales=torch.zeros(panels * PANEL))
        if format == "int4":
            block = _GROUP_BYTES + PANEL * (4 if has_offsets else 2)
            data = self._arena.empty((panels, in_features // GROUP_SIZE, block), torch.uint8)
            return PackedLinear(data, out_features, in_features, dtype, format, has_offsets=has_offsets)
        raise ValueError(f"format must be plain, int8 or int4; got {format!r}")

    def pack_rows(self, packed: PackedLinear, first_row: int, rows: torch.Tensor) -> None:
        panel = self._panel(packed, first_row, *rows.shape)
        if packed.format == "int4":
            self.pack_codes(packed, first_row, *round_int4(rows))
        elif packed.scales is not None:
            codes, scales = round_int8(rows)
            packed.scales[first_row : first_row + len(rows)] = scales
            self.extension.pack_int8(codes.data_ptr(), panel.data_ptr(), *rows.shape)
        else:
            source = rows.to(panel.dtype).contiguous()
            self.extension.pack(source.data_ptr(), panel.data_ptr(), FORMATS[panel.dtype], *rows.shape)

    def pack_codes(
        self,
        packed: PackedLinear,
        first_row: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
    ) -> None:
        check_codes(packed, codes, scales, offsets)
        panel = self._panel(packed, first_row, len(codes), packed.in_features)
        parts = [None if part is None else part.contiguous() for part in (codes, scales, offsets)]
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        self.extension.pack_int4(*addresses, panel.data_ptr(), len(codes), packed.in_features)

    def _panel(self, packed: PackedLinear, first_row: int, num_rows: int, width: int) -> torch.Tensor:
        """The panels from that of `first_row` on."""
        if first_row % PANEL or width != packed.in_features or first_row + num_rows > packed.out_features:
            raise ValueError(
                f"rows {first_row} to {first_row + num_rows} of {width} do not fit "
                f"[{packed.out_features}, {packed.in_features}] in panels of {PANEL}"
            )
        return packed.data[first_row // PANEL :]

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
        m, k = x.shape
        n = weight.out_features
        if k != weight.in_features or x.dtype is not _F32 or not x.is_contiguous():
            raise refuse("x", f"float32 [tokens, {weight.in_features}]", x)
        if residual is None:
            out = torch.empty(m, n)
        else:
            out = residual
            if out.shape != (m, n) or out.dtype is not _F32 or not out.is_contiguous():
                raise refuse("residual", f"float32 [{m}, {n}]", out)
        address = bias_format = 0
        if bias is not None:
            if bias.shape != (n,) or not bias.is_contiguous():
                raise refuse("bias", f"[{n}]", bias)
            address, bias_format = bias.data_ptr(), format_of(bias, "bias")
        data = weight.data
        if weight.format == "plain":
            multiply, format = self._linear, [FORMATS[data.dtype]]
        elif weight.scales is not None:
            multiply, format = self._linear_codes, [0, weight.scales.data_ptr()]
        else:
            multiply, format = self._linear_codes, [2 if weight.has_offsets else 1, 0]
        multiply(
            x.data_ptr(),
            data.data_ptr(),
            *format,
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
            raise refuse("x", "float32", x)
        if weight.shape != (n,) or not weight.is_contiguous():
            raise refuse("weight", f"[{n}]", weight)
        out = torch.empty(rows, n)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), format_of(weight, "weight"), out.data_ptr(), rows, n, eps)
        return out

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        rows, n = x.shape
        if x.dtype is not _F32 or not x.is_contiguous():
            raise refuse("x", "float32", x)
        if weight.shape != (n,) or not weight.is_contiguous():
            raise refuse("weight", f"[{n}]", weight)
        address = bias_format = 0
        if bias is not None:
            if bias.shape != (n,) or not bias.is_contiguous():
                raise refuse("bias", f"[{n}]", bias)
            address, bias_format = bias.data_ptr(), format_of(bias, "bias")
        out = torch.empty(rows, n)
        self.extension.layer_norm(
            x.data_ptr(),
            weight.data_ptr(),
            format_of(weight, "weight"),
            address,
            bias_format,
            out.data_ptr(),
            rows,
            n,
            eps,
        )
        return out

    def gate_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in GATES:
            raise ValueError(f"activation must be one of {', '.join(GATES)}; got {activation!r}")
        rows, n = gate_up.shape
        if gate_up.dtype is not _F32 or not gate_up.is_contiguous() or n % 2:
            raise refuse("gate_up", "float32 [tokens, 2 * intermediate]", gate_up)
        out = torch.empty(rows, n // 2)
        self._gate_mul(gate_up.data_ptr(), out.data_ptr(), rows, n // 2, ACTIVATIONS.index(activation))
        return out

    def activate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if x.dtype is not _F32 or not x.is_contiguous():
            raise refuse("x", "float32", x)
        out = torch.empty(x.shape)
        self._activate(x.data_ptr(), out.data_ptr(), x.numel(), ACTIVATIONS.index(activation))
        return out

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        if not 0 < cap < math.inf:
            raise ValueError(f"cap must be positive and finite; got {cap}")
        if x.dtype is not _F32 or not x.is_contiguous():
            raise refuse("x", "float32", x)
        self.extension.soft_cap(x.data_ptr(), x.numel(), cap)
        return x

    def gather_rows(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """table [V, H], ids int32 [T] -> float32 [T, H]. Raises ValueError for an id outside the table."""
        if ids.dtype is not _I32 or ids.dim() != 1 or not ids.is_contiguous():
            raise refuse("ids", "int32 [tokens]", ids)
        if table.dim() != 2 or not table.is_contiguous():
            raise refuse("table", "[vocabulary, features]", table)
        rows, width = len(ids), table.shape[1]
        out = torch.empty(rows, width)
        self.extension.gather_rows(
            table.data_ptr(), format_of(table, "table"), ids.data_ptr(), out.data_ptr(), rows, width, len(table)
        )
        return out
