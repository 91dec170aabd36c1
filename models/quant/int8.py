"""W8A8: weights in 8 bits with a scale per output, activations as they come with one per token and 64 inputs.

Absolute maxima on both sides, symmetric. A few inputs of language models are a hundred times larger than the others
(Dettmers et al. 2022 compute those in 16 bits); short spans keep what they cost to themselves. Sums are exact in int32,
so a row's bits depend on nothing but the row (C4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.ops.kernels import Kernels
from models.quant.method import PackedWeight, WeightPart, stacked_shape
from models.quant.packer import Packer
from models.weight_reader import WeightReader


class Int8:
    """Quantises a floating-point checkpoint while it is loaded."""

    name = "int8"

    def __init__(self, kernels: Kernels, dtype: torch.dtype, packer: Packer) -> None:
        """dtype: in which weights are read; rows are rounded to codes from it."""
        self._kernels = kernels
        self._dtype = dtype
        self._packer = packer

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> PackedWeight:
        packed = self._kernels.empty_packed(*stacked_shape(parts), self._dtype, "int8")
        self._packer.pack(reader, parts, packed)
        return PackedWeight(self._kernels, packed)
