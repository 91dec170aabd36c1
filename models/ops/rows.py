"""Reductions over rows of logits and gathers of embeddings: our kernels where they run, torch elsewhere.

Each result depends on its own row alone, in a fixed order of operations (C4).
"""

from __future__ import annotations

import torch

from models.ops.cpu import load_extension


def _is_ours(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype is torch.float32 and rows.is_contiguous()


def argmax_rows(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] -> int32 [S]: the lowest index of the greatest value. V must be at least 1; NaN is unsupported."""
    count, width = logits.shape
    extension = load_extension()
    if extension is None or not _is_ours(logits):
        return logits.argmax(-1).int()
    out = torch.empty(count, dtype=torch.int32)
    extension.argmax_rows(logits.data_ptr(), out.data_ptr(), count, width)
    return out


def logsumexp_rows(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] -> float32 [S]: log of the sum of exp; -inf for a row of -inf."""
    count, width = logits.shape
    extension = load_extension()
    if extension is None or not _is_ours(logits):
        sums = [torch.logsumexp(row.float(), -1) for row in logits]
        return torch.stack(sums) if sums else logits.new_zeros(0, dtype=torch.float32)
    out = torch.empty(count)
    extension.logsumexp_rows(logits.data_ptr(), out.data_ptr(), count, width)
    return out
