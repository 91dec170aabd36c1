"""Learned position embeddings: one vector per position, added to the token's (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from models.layers.loader import Loader


class LearnedPositions:
    """A table of vectors by position. Every tensor-parallel rank holds the positions that are served."""

    def __init__(
        self, loader: Loader, name: str, max_positions: int, hidden_size: int, max_model_len: int, offset: int = 0
    ) -> None:
        """max_positions: that the model was trained for; offset: rows of the stored table before position 0."""
        shape = (offset + max_positions, hidden_size)
        self._table = loader.table(f"{name}.weight", shape, range(offset, offset + max_model_len))

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] with the vectors of int32 `positions` [T] added in place."""
        return x.add_(F.embedding(positions, self._table).to(x.dtype))
