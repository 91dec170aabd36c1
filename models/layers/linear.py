"""Linear layers that shard their own maths and their own weights (Megatron-LM, Shoeybi et al. 2019)."""

from __future__ import annotations

import torch

from models.layers.loader import Loader
from models.quant.method import WeightPart


class ColumnParallel:
    """y = x Wᵀ + b with the outputs of one or more stacked weights shared among the ranks."""

    def __init__(self, loader: Loader, parts: list[WeightPart], has_bias: bool) -> None:
        """`parts` are this rank's rows of every weight."""
        self._bias = loader.bias(parts) if has_bias else None
        self._weight = loader.linear(parts)
        self._apply = self._weight.apply
        self.num_bytes = self._weight.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, in] -> [M, this rank's outputs]."""
        return self._apply(x, self._bias)


class QKVParallel(ColumnParallel):
    """The three attention projections in one multiplication; a rank has whole heads."""

    def __init__(
        self, loader: Loader, hidden_size: int, num_heads: int, num_kv_heads: int, head_size: int, has_bias: bool
    ) -> None:
        heads, kv_heads = loader.group.heads(num_heads, num_kv_heads)
        self.num_heads = len(heads)
        self.num_kv_heads = len(kv_heads)

        def part(name: str, total: int, own: range) -> WeightPart:
            rows = range(own.start * head_size, own.stop * head_size)
            return WeightPart(name, (total * head_size, hidden_size), rows)

        parts = [
            part("q_proj", num_heads, heads),
            part("k_proj", num_kv_heads, kv_heads),
            part("v_proj", num_kv_heads, kv_heads),
        ]
        super().__init__(loader, parts, has_bias)


class GateUpParallel(ColumnParallel):
    """The two input projections of a gated MLP in one multiplication."""

    def __init__(self, loader: Loader, hidden_size: int, intermediate_size: int, has_bias: bool) -> None:
        own = loader.group.share(intermediate_size)
        shape = (intermediate_size, hidden_size)
        super().__init__(loader, [WeightPart("gate_proj", shape, own), WeightPart("up_proj", shape, own)], has_bias)


class RowParallel:
    """residual += x Wᵀ + b with the inputs shared among the ranks, then summed over them."""

    def __init__(self, loader: Loader, name: str, out_features: int, columns: range, in_features: int, has_bias: bool):
        """`columns` are the inputs that this rank holds."""
        part = WeightPart(name, (out_features, in_features), columns=columns)
        bias = loader.bias([part]) if has_bias else None
        self._group = loader.group
        self._bias = bias if loader.group.rank == 0 else None  # added once, not once per rank
        self._weight = loader.linear([part])
        self._apply = self._weight.apply
        self.num_bytes = self._weight.num_bytes

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[M, this rank's inputs] and residual [M, out], which is changed in place and returned."""
        if self._group.size == 1:
            return self._apply(x, self._bias, residual)
        return residual.add_(self._group.all_reduce(self._apply(x, self._bias)))
