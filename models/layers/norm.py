"""Normalisations."""

from __future__ import annotations

import torch

from models.layers.loader import Loader


class RMSNorm:
    """Root-mean-square normalisation (Zhang & Sennrich 2019)."""

    def __init__(self, loader: Loader, name: str, size: int, eps: float, offset: float = 0.0) -> None:
        """offset: added to the stored weights (Gemma stores w - 1)."""
        self._weight = loader.vector(f"{name}.weight", size)
        if offset:
            self._weight += offset
        self._eps = eps
        self._rms_norm = loader.kernels.rms_norm
        self.num_bytes = self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, size] -> a new [M, size]."""
        return self._rms_norm(x, self._weight, self._eps)


def head_norms(loader: Loader, size: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [size] of the norms of every head of q and k; `loader` is scoped to the attention."""
    q, k = (loader.vector(f"{name}.weight", size) for name in ("q_norm", "k_norm"))
    return (q.add_(offset), k.add_(offset)) if offset else (q, k)


class LayerNorm:
    """Mean and variance normalised (Ba et al. 2016)."""

    _bias: torch.Tensor | None

    def __init__(self, loader: Loader, name: str, size: int, eps: float, has_weights: bool = True) -> None:
        """has_weights: whether the model holds a weight and a bias; else they are 1 and 0."""
        if has_weights:
            self._weight = loader.vector(f"{name}.weight", size)
            self._bias = loader.vector(f"{name}.bias", size)
        else:
            self._weight = torch.ones(size, dtype=loader.kernels.activation_dtype, device=loader.device)
            self._bias = None
        self._eps = eps
        self._layer_norm = loader.kernels.layer_norm
        self.num_bytes = self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, size] -> a new [M, size]."""
        return self._layer_norm(x, self._weight, self._bias, self._eps)
