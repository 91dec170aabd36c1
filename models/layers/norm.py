"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch

from models.layers.loader import Loader


class RMSNorm:
    def __init__(self, loader: Loader, name: str, size: int, eps: float) -> None:
        self._weight = loader.vector(f"{name}.weight", size)
        self._eps = eps
        self._rms_norm = loader.kernels.rms_norm
        self.num_bytes = self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, size] -> a new [M, size]."""
        return self._rms_norm(x, self._weight, self._eps)
