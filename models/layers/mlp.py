"""The gated feed-forward network (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

import torch

from models.config import ModelConfig
from models.layers.linear import GateUpParallel, RowParallel
from models.layers.loader import Loader


class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, loader: Loader, config: ModelConfig) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = GateUpParallel(loader, width, inner, config.mlp_bias)
        own = loader.group.share(inner)
        self.down_proj = RowParallel(loader, "down_proj", width, own, inner, config.mlp_bias)
        self.num_bytes = self.gate_up_proj.num_bytes + self.down_proj.num_bytes
        self._gate_mul = loader.kernels.gate_mul

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[M, hidden] -> residual [M, hidden] with the result added in place."""
        return self.down_proj(self._gate_mul(self.gate_up_proj(x), "silu"), residual)
