"""Weights multiplied in the floating-point type in which the model is served: bf16, fp16 or fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.checkpoint import WeightReader
from models.ops.kernels import Kernels
from models.quant.method import PackedWeight, WeightPart, read_part


class Unquantized:
    """Converts to `dtype` and leaves the layout to the kernels."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self._kernels = kernels
        # Every weight is put together in the same memory: fresh pages cost more than the copy into them.
        self._stacking = torch.empty(0, dtype=dtype, device=device)

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> PackedWeight:
        heights = [part.part_shape[0] for part in parts]
        out_features, in_features = sum(heights), parts[0].part_shape[1]
        if self._stacking.numel() < out_features * in_features:
            self._stacking = self._stacking.new_empty(out_features * in_features)
        stacked = self._stacking[: out_features * in_features].view(out_features, in_features)
        for part, into in zip(parts, torch.split(stacked, heights), strict=True):
            read_part(reader, part, into)
        return PackedWeight(self._kernels, self._kernels.pack(stacked))
