"""Weights multiplied in the floating-point type in which the model is served: bf16, fp16 or fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.checkpoint import WeightReader
from models.ops.kernels import Kernels
from models.quant.method import WeightPart


class Unquantized:
    """Converts to `dtype` and leaves the layout to the kernels."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self._kernels = kernels
        self._dtype = dtype
        self._device = device

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> UnquantizedWeight:
        shapes = [part.part_shape for part in parts]
        out_features, in_features = sum(rows for rows, _ in shapes), shapes[0][1]
        stacked = torch.empty(out_features, in_features, dtype=self._dtype, device=self._device)
        for part, into in zip(parts, torch.split(stacked, [rows for rows, _ in shapes]), strict=True):
            reader.read_into(into, f"{part.name}.weight", part.shape, part.rows, part.columns)
        return UnquantizedWeight(self._kernels, stacked)


class UnquantizedWeight:
    """[out, in] in the kernels' own layout."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor) -> None:
        self.num_bytes = weight.nbytes
        self._packed = kernels.pack(weight)
        self._linear = kernels.linear

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._linear(x, self._packed, bias, residual)
