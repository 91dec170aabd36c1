"""What the hardware allows: the formulas of the project's performance page, once.

Bytes over bandwidth or operations over rate, whichever is longer, for one step of a dense decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured in the same run."""

    read_bytes_s: float
    flops_s: float

    def as_json(self) -> dict[str, float]:
        return {"read_gb_s": round(self.read_bytes_s / 1e9, 2), "gflop_s": round(self.flops_s / 1e9, 1)}


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder as the formulas see it."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    body_parameters: int  # all linear weights inside layers
    head_parameters: int  # the language-model head
    weight_bytes: float  # bytes per weight
    kv_bytes: float  # bytes per element of the KV cache

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.kv_bytes

    def attention_flops(self, query_context_pairs: float) -> float:
        """Scores and weighted sums of so many (query token, context token) pairs, all layers."""
        return 4 * self.num_layers * self.num_heads * self.head_size * query_context_pairs


def decode_time_min(shape: Shape, contexts: Sequence[int], ceilings: Ceilings) -> float:
    """Seconds of one step that adds one token to each row; contexts: tokens before it."""
    rows, total = len(contexts), float(sum(contexts))
    weights = max(
        shape.parameters * shape.weight_bytes / ceilings.read_bytes_s, 2 * shape.parameters * rows / ceilings.flops_s
    )
    cache = max(
        shape.kv_bytes_per_token * total / ceilings.read_bytes_s, shape.attention_flops(total) / ceilings.flops_s
    )
    return weights + cache + shape.kv_bytes_per_token * rows / ceilings.read_bytes_s


def prefill_time_min(shape: Shape, num_new: int, num_cached: int, ceilings: Ceilings) -> float:
    """Seconds for `num_new` prompt tokens after `num_cached`; logits of the last one only."""
    flops = 2 * shape.body_parameters * num_new + 2 * shape.head_parameters
    flops += shape.attention_flops(num_new * num_cached + num_new * num_new / 2)
    read = shape.parameters * shape.weight_bytes + shape.kv_bytes_per_token * (num_new + num_cached)
    return max(flops / ceilings.flops_s, read / ceilings.read_bytes_s)
