"""What a layer is made from: weights, kernels and its share of the work, scoped to a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from models.ops.kernels import Kernels
from models.packed_cache import PackedCache
from models.parallel import Group
from models.quant.method import LinearMethod, PackedWeight, WeightPart
from models.weight_reader import WeightReader


@dataclasses.dataclass(frozen=True, slots=True)
class Loader:
    """Layers load in their constructor, so a layer that exists is a layer that is filled."""

    reader: WeightReader
    kernels: Kernels
    method: LinearMethod
    group: Group
    dtype: torch.dtype  # of weights
    device: torch.device
    prefix: str = ""
    cache: PackedCache | None = None  # of linears

    def at(self, name: str) -> Loader:
        """The same for the part of the model called `name` within this one."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def linear(self, parts: Sequence[WeightPart]) -> PackedWeight:
        """Parts stacked along the outputs; their names are relative to this loader's prefix."""
        scoped = [dataclasses.replace(part, name=self.prefix + part.name) for part in parts]
        if self.cache is None:
            return self.method.load(self.reader, scoped)
        packed = self.cache.load(scoped, self.reader, self.kernels)
        if packed is not None:
            return PackedWeight(self.kernels, packed)
        weight = self.method.load(self.reader, scoped)
        self.cache.keep(scoped, weight.packed)
        return weight

    def bias(self, parts: Sequence[WeightPart]) -> torch.Tensor:
        """The biases that go with `linear(parts)`, in the activations' type."""
        return torch.cat([self.vector(f"{part.name}.bias", part.shape[0], part.rows) for part in parts])

    def vector(self, name: str, size: int, rows: range | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A norm weight or bias, in the activations' type unless said."""
        dtype = dtype or self.kernels.activation_dtype
        vector = torch.empty(size if rows is None else len(rows), dtype=dtype, device=self.device)
        self.reader.read_into(vector, self.prefix + name, (size,), rows)
        return vector

    def table(self, name: str, shape: tuple[int, int], rows: range) -> torch.Tensor:
        """Rows of a matrix that is indexed, not multiplied, in the weights' type."""
        table = torch.empty(len(rows), shape[1], dtype=self.dtype, device=self.device)
        self.reader.read_into(table, self.prefix + name, shape, rows)
        return table
