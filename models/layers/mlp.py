"""Feed-forward networks."""

from __future__ import annotations

from typing import Protocol

import torch

from models.config import ModelConfig
from models.layers.linear import ColumnParallel, RowParallel
from models.layers.loader import Loader
from models.quant.method import WeightPart


class FeedForward(Protocol):
    """What stands between a block's second norm and its residual."""

    num_bytes: int  # of weights, that this rank reads in one decode step

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden] -> residual [M, hidden] with the result added in place; without one, the result."""
        ...


class GatedMLP:
    """down(activation(gate(x)) * up(x)) (GLU variants, Shazeer 2020)."""

    def __init__(self, loader: Loader, config: ModelConfig) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        own = loader.group.part("intermediate_size", inner)
        parts = [WeightPart(name, (inner, width), own) for name in ("gate_proj", "up_proj")]
        self.gate_up_proj = ColumnParallel(loader, parts, config.has_mlp_bias)
        self.down_proj = RowParallel(loader, "down_proj", width, own, inner, config.has_mlp_bias)
        self.num_bytes = self.gate_up_proj.num_bytes + self.down_proj.num_bytes
        self._activation = config.activation
        self._gate_mul = loader.kernels.gate_mul

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden] -> residual [M, hidden] with the result added in place; without one, the result."""
        return self.down_proj(self._gate_mul(self.gate_up_proj(x), self._activation), residual)


class MLP:
    """down(activation(up(x)))."""

    def __init__(self, loader: Loader, config: ModelConfig, up: str, down: str, is_transposed: bool = False) -> None:
        """up, down: names of the two linears; is_transposed: whether they are stored as [in, out]."""
        width, inner = config.hidden_size, config.intermediate_size
        own = loader.group.part("intermediate_size", inner)
        part = WeightPart(up, (inner, width), own, is_transposed=is_transposed)
        self.up_proj = ColumnParallel(loader, [part], config.has_mlp_bias)
        self.down_proj = RowParallel(loader, down, width, own, inner, config.has_mlp_bias, is_transposed)
        self.num_bytes = self.up_proj.num_bytes + self.down_proj.num_bytes
        self._activation = config.activation
        self._activate = loader.kernels.activate

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden] -> residual [M, hidden] with the result added in place; without one, the result."""
        return self.down_proj(self._activate(self.up_proj(x), self._activation), residual)
