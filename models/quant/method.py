"""What a weight format is to a layer: a way to load a linear weight, and the weight that it loads (C10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from models.ops.kernels import GROUP_SIZE, Kernels, PackedLinear
from models.weight_reader import WeightReader


@dataclasses.dataclass(frozen=True, slots=True)
class WeightPart:
    """A rectangle of the linear weight `name` (without ".weight"), which is `shape` [out, in] as a whole."""

    name: str
    shape: tuple[int, int]
    rows: range | None = None  # None = all
    columns: range | None = None
    is_transposed: bool = False  # stored as [in, out] (GPT-2's "Conv1D")
    is_head: bool = False  # gives the logits: what is rounded here reaches them undamped

    @property
    def part_shape(self) -> tuple[int, int]:
        out_features, in_features = self.shape
        return (
            out_features if self.rows is None else len(self.rows),
            in_features if self.columns is None else len(self.columns),
        )

    @property
    def stored_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def stored_shape(self) -> tuple[int, int]:
        return self.shape[::-1] if self.is_transposed else self.shape


def stacked_shape(parts: Sequence[WeightPart]) -> tuple[int, int]:
    """[out, in] of parts of equal width, stacked along the outputs."""
    heights, widths = zip(*(part.part_shape for part in parts), strict=True)
    return sum(heights), widths[0]


class PackedWeight:
    """A weight in the form in which it is multiplied."""

    def __init__(self, kernels: Kernels, packed: PackedLinear) -> None:
        self.packed = packed
        self.num_bytes = packed.num_bytes
        self._linear = kernels.linear

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [M, in] -> [M, out]; with `residual` the result is added to it in place and returned."""
        return self._linear(x, self.packed, bias, residual)


class LinearMethod(Protocol):
    """A weight format."""

    name: str  # enters the fingerprint

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> PackedWeight:
        """Read `parts` of equal width, stack them along the outputs and repack them once."""
        ...


def has_codes(reader: WeightReader, part: WeightPart) -> bool:
    """Whether the part is stored as 4-bit codes (`models/store/gguf_weights.py` says how)."""
    return reader.has(f"{part.name}.codes")


def claim_part(reader: WeightReader, part: WeightPart) -> None:
    """Count the weight as a part of the model, however it is stored. Raises ModelError as `WeightReader.claim`."""
    if not has_codes(reader, part):
        reader.claim(part.stored_name, part.stored_shape)
        return
    out_features, in_features = part.shape
    reader.claim(f"{part.name}.codes", (out_features, in_features // 2))
    for name in ("scales", "offsets"):
        if name == "scales" or reader.has(f"{part.name}.{name}"):
            reader.claim(f"{part.name}.{name}", (out_features, in_features // GROUP_SIZE))


def read_part(reader: WeightReader, part: WeightPart, out: torch.Tensor) -> None:
    """Fill `out`, contiguous and of the part's shape. Raises ModelError as `WeightReader.read_into` does."""
    if not part.is_transposed:
        reader.read_into(out, part.stored_name, part.stored_shape, part.rows, part.columns)
        return
    stored = torch.empty(out.shape[::-1], dtype=out.dtype, device=out.device)
    reader.read_into(stored, part.stored_name, part.stored_shape, part.columns, part.rows)
    out.copy_(stored.T)
