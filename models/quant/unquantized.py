"""Weights multiplied in the floating-point type in which the model is served: bf16, fp16 or fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.ops.kernels import Kernels
from models.quant.method import PackedWeight, WeightPart, stacked_shape
from models.quant.packer import Packer
from models.weight_reader import WeightReader


class Unquantized:
    """Converts to `dtype` and leaves the layout to the kernels."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, packer: Packer) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self._kernels = kernels
        self._dtype = dtype
        self._packer = packer

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> PackedWeight:
        packed = self._kernels.empty_packed(*stacked_shape(parts), self._dtype)
        self._packer.pack(reader, parts, packed)
        return PackedWeight(self._kernels, packed)
