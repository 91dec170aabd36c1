"""Normalisations."""

from __future__ import annotations

import torch

from models.layers.loader import Loader


class RMSNorm:
    """Root-mean-square normalisation (Zhang & Sennrich 2019)."""

    def __init__(self, loader: Loader, name: str, size: int, eps: float, offset: float = 0.0) -> None:
        """offset: added to the stored weights (Gemma stores w - 1)."""
        self._weight = _offset_weight(loader, name, size, offset)
        self._eps = eps
        self._rms_norm = loader.kernels.rms_norm
        self.num_bytes = self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, size] -> a new [M, size]."""
        return self._rms_norm(x, self._weight, self._eps)


def head_norms(loader: Loader, size: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [size] of the norms of every head of q and k; `loader` is scoped to the attention."""
    return _offset_weight(loader, "q_norm", size, offset), _offset_weight(loader, "k_norm", size, offset)


def _offset_weight(loader: Loader, name: str, size: int, offset: float) -> torch.Tensor:
    """Sums in fp32, as in training: 16 bits hold what is stored, but not one more than that."""
    if not offset:
        return loader.vector(f"{name}.weight", size)
    wide = torch.promote_types(loader.kernels.activation_dtype, torch.float32)
    return loader.vector(f"{name}.weight", size, dtype=wide).add_(offset)


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
