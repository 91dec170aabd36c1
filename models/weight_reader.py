"""Where layers take their weights from: a checkpoint, or values made up for a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes that this rank reads in all)."""


class WeightReader(Protocol):
    """A rank names the whole model's tensors and takes its parts of them.

    Claimed are the tensors that the model consists of. What nobody claims or skips is no part of it.
    """

    @property
    def num_parameters(self) -> int:
        """Elements of the tensors claimed so far, each counted once and whole."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name. Asking claims nothing."""
        ...

    def claim(self, name: str, shape: tuple[int, ...]) -> None:
        """Count the tensor as a part of the model; its values come from elsewhere.

        Raises ModelError when it is missing or has another shape.
        """
        ...

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        """Claim the tensor `name` of the whole model's `shape` and copy a part of it to `out`.

        `out` is contiguous and has the part's shape; values are converted to its type. On the meta device
        nothing is read. Raises ModelError when the tensor is missing, has another shape or cannot be read.
        """
        ...

    def skip(self, prefix: str) -> None:
        """Pass over every tensor whose name starts with `prefix`."""
        ...
