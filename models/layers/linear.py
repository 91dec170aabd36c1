"""Linear layers that shard their own maths and their own weights (Megatron-LM, Shoeybi et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.config import ModelConfig
from models.layers.loader import Loader
from models.parallel import Group
from models.quant.method import WeightPart


class ColumnParallel:
    """y = x Wᵀ + b with the outputs of one or more stacked weights shared among the ranks."""

    def __init__(self, loader: Loader, parts: Sequence[WeightPart], has_bias: bool) -> None:
        """`parts` are this rank's rows of every weight."""
        self._bias = loader.bias(parts) if has_bias else None
        self._weight = loader.linear(parts)
        self._apply = self._weight.apply
        self.num_bytes = self._weight.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, in] -> [M, this rank's outputs]."""
        return self._apply(x, self._bias)


class RowParallel:
    """residual += x Wᵀ + b with the inputs shared among the ranks, then summed over them."""

    def __init__(
        self,
        loader: Loader,
        name: str,
        out_features: int,
        columns: range,
        in_features: int,
        has_bias: bool,
        is_transposed: bool = False,
    ) -> None:
        """`columns` are the inputs that this rank holds."""
        part = WeightPart(name, (out_features, in_features), columns=columns, is_transposed=is_transposed)
        bias = loader.bias([part]) if has_bias else None
        self._group = loader.group
        self._bias = bias if loader.group.rank == 0 else None  # added once, not once per rank
        self._weight = loader.linear([part])
        self._apply = self._weight.apply
        self.num_bytes = self._weight.num_bytes

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[M, this rank's inputs] -> [M, out]; residual [M, out] is changed in place and returned."""
        if self._group.size == 1:
            return self._apply(x, self._bias, residual)
        out = self._group.all_reduce(self._apply(x, self._bias))
        return out if residual is None else residual.add_(out)


# --- this rank's rows of the attention projections, in the ways in which models store them --------


def separate_qkv(group: Group, config: ModelConfig, names: tuple[str, str, str] | None = None) -> list[WeightPart]:
    """Three weights, each [heads * head_size, hidden]."""
    heads, kv_heads = group.heads(config.num_heads, config.num_kv_heads)
    size = config.head_size

    def part(name: str, total: int, own: range) -> WeightPart:
        return WeightPart(name, (total * size, config.hidden_size), range(own.start * size, own.stop * size))

    q, k, v = names or ("q_proj", "k_proj", "v_proj")
    return [
        part(q, config.num_heads, heads),
        part(k, config.num_kv_heads, kv_heads),
        part(v, config.num_kv_heads, kv_heads),
    ]


def stacked_qkv(group: Group, config: ModelConfig, name: str, is_transposed: bool = False) -> list[WeightPart]:
    """One weight: all of q, then k, then v (GPT-2)."""
    heads, kv_heads = group.heads(config.num_heads, config.num_kv_heads)
    size = config.head_size
    shape = ((config.num_heads + 2 * config.num_kv_heads) * size, config.hidden_size)
    starts = (0, config.num_heads, config.num_heads + config.num_kv_heads)
    return [
        WeightPart(
            name, shape, range((start + own.start) * size, (start + own.stop) * size), is_transposed=is_transposed
        )
        for start, own in zip(starts, (heads, kv_heads, kv_heads), strict=True)
    ]


def interleaved_qkv(group: Group, config: ModelConfig, name: str) -> list[WeightPart]:
    """One weight: q, k and v of the first head, then of the second, … (GPT-NeoX)."""
    heads, _ = group.heads(config.num_heads, config.num_heads)
    size = config.head_size
    shape = (3 * config.num_heads * size, config.hidden_size)
    return [
        WeightPart(name, shape, range((3 * head + which) * size, (3 * head + which + 1) * size))
        for which in range(3)
        for head in heads
    ]
