"""What a weight format is to a layer: a way to load a linear weight, and the weight that it loads (C10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from models.checkpoint import WeightReader


@dataclasses.dataclass(frozen=True, slots=True)
class WeightPart:
    """A rectangle of the linear weight `name` (without ".weight"), which is `shape` [out, in] as a whole."""

    name: str
    shape: tuple[int, int]
    rows: range | None = None  # None = all
    columns: range | None = None

    @property
    def part_shape(self) -> tuple[int, int]:
        out_features, in_features = self.shape
        return (
            out_features if self.rows is None else len(self.rows),
            in_features if self.columns is None else len(self.columns),
        )


class LinearWeight(Protocol):
    """A weight in the form in which it is multiplied."""

    num_bytes: int  # that one multiplication reads

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [M, in] -> [M, out]; with `residual` the result is added to it in place and returned."""
        ...


class LinearMethod(Protocol):
    """A weight format."""

    name: str  # enters the fingerprint

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> LinearWeight:
        """Read `parts` of equal width, stack them along the outputs and repack them once."""
        ...
