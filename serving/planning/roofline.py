"""What the hardware allows: the formulas of the project's performance page, once.

Bytes over bandwidth or operations over rate, whichever is longer, for one step of a decoder. `argosy plan` predicts
with them and the benchmarks hold measurements against them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Ceilings:
    """Of one device."""

    read_bytes_s: float
    flops_s: float  # of linear layers
    attention_flops_s: float | None = None  # None = the same

    def as_json(self) -> dict[str, float]:
        return {"read_gb_s": round(self.read_bytes_s / 1e9, 2), "gflop_s": round(self.flops_s / 1e9, 1)}


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertShape:
    """Mixtures of experts; tokens are taken to choose evenly and independently."""

    num_experts: int  # of a layer, on all ranks together
    num_held: int  # of a layer, on this device
    num_chosen: int  # by a token
    parameters: int  # of one expert of every layer

    def read(self, num_tokens: float) -> float:
        """Expected parameters of the held experts that at least one of the tokens chose."""
        is_chosen = 1 - math.pow(1 - self.num_chosen / self.num_experts, num_tokens)
        return self.num_held * is_chosen * self.parameters

    @property
    def multiplied(self) -> float:
        """Expected parameters here that one token is multiplied with."""
        return self.num_chosen * self.num_held / self.num_experts * self.parameters


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A decoder, or one rank's share of it, as the formulas see it."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    body_parameters: int  # linear weights inside layers that every token meets
    head_parameters: int  # the language-model head
    weight_bytes: float  # bytes per weight
    kv_bytes: float  # bytes per element of the KV cache
    windows: tuple[int, ...] = ()  # per layer, 0 = all of the context; () = all layers 0
    experts: ExpertShape | None = None

    @property
    def parameters(self) -> int:
        """Linear weights outside experts."""
        return self.body_parameters + self.head_parameters

    @property
    def kv_bytes_per_token(self) -> float:
        return self.num_layers * self._kv_bytes_per_layer

    @property
    def _kv_bytes_per_layer(self) -> float:
        return 2 * self.num_kv_heads * self.head_size * self.kv_bytes

    def parameters_read(self, num_tokens: float) -> float:
        """By one step over so many tokens."""
        return self.parameters + (self.experts.read(num_tokens) if self.experts else 0.0)

    def linear_flops(self, num_tokens: float, num_logits: float) -> float:
        in_layers = self.body_parameters + (self.experts.multiplied if self.experts else 0.0)
        return 2 * in_layers * num_tokens + 2 * self.head_parameters * num_logits

    def cached_pairs(self, contexts: Iterable[int]) -> float:
        """(layer, cached token) pairs that one new token after each context sees."""
        if not self.windows:
            return float(self.num_layers * sum(contexts))
        return float(
            sum(min(context, window - 1) if window else context for context in contexts for window in self.windows)
        )

    def prompt_pairs(self, num_new: int, num_cached: int) -> float:
        """(layer, new token, token that it sees) triples of a prompt's part."""
        everything = num_new * num_cached + num_new * num_new / 2
        if not self.windows:
            return self.num_layers * everything
        return sum(banded(num_new, num_cached, window) if window else everything for window in self.windows)

    def cache_bytes(self, pairs: float) -> float:
        return self._kv_bytes_per_layer * pairs

    def attention_flops(self, pairs: float) -> float:
        """Scores and weighted sums."""
        return 4 * self.num_heads * self.head_size * pairs


def decode_time_min(shape: Shape, contexts: Sequence[int], ceilings: Ceilings) -> float:
    """Seconds of one step that adds one token to each row; contexts: tokens before it."""
    rows = len(contexts)
    weights = max(
        shape.parameters_read(rows) * shape.weight_bytes / ceilings.read_bytes_s,
        shape.linear_flops(rows, rows) / ceilings.flops_s,
    )
    pairs = shape.cached_pairs(contexts)
    cache = max(
        shape.cache_bytes(pairs) / ceilings.read_bytes_s,
        shape.attention_flops(pairs) / (ceilings.attention_flops_s or ceilings.flops_s),
    )
    return weights + cache + shape.kv_bytes_per_token * rows / ceilings.read_bytes_s


def prefill_time_min(shape: Shape, num_new: int, num_cached: int, ceilings: Ceilings) -> float:
    """Seconds for `num_new` prompt tokens after `num_cached`; logits of the last one only."""
    attention = shape.attention_flops(shape.prompt_pairs(num_new, num_cached))
    computing = shape.linear_flops(num_new, 1) / ceilings.flops_s
    computing += attention / (ceilings.attention_flops_s or ceilings.flops_s)
    read = shape.parameters_read(num_new) * shape.weight_bytes + shape.kv_bytes_per_token * (num_new + num_cached)
    return max(computing, read / ceilings.read_bytes_s)


def step_time_min(
    shape: Shape,
    ceilings: Ceilings,
    *,
    num_tokens: int,
    num_logits: int,
    decode_pairs: float,
    prompt_pairs: float = 0.0,
    cached_pairs: float = 0.0,
) -> float:
    """Seconds of one step that may decode rows and compute parts of prompts together.

    num_tokens: of all rows. decode_pairs: `cached_pairs` of rows with one token. prompt_pairs: `prompt_pairs` of the
    others. cached_pairs: (layer, cached token) pairs that the prompts' parts read, each once.
    Linears read their weights once for all rows; attention follows them, it does not overlap with them. Without
    prompts this is `decode_time_min`.
    """
    read_bytes_s, attention_flops_s = ceilings.read_bytes_s, ceilings.attention_flops_s or ceilings.flops_s
    linears = max(
        shape.parameters_read(num_tokens) * shape.weight_bytes / read_bytes_s,
        shape.linear_flops(num_tokens, num_logits) / ceilings.flops_s,
    )
    decoding = max(
        shape.cache_bytes(decode_pairs) / read_bytes_s, shape.attention_flops(decode_pairs) / attention_flops_s
    )
    prompts = max(
        shape.cache_bytes(cached_pairs) / read_bytes_s, shape.attention_flops(prompt_pairs) / attention_flops_s
    )
    return linears + decoding + prompts + shape.kv_bytes_per_token * num_tokens / read_bytes_s


def banded(num_new: int, num_cached: int, window: int) -> float:
    """The integral of min(num_cached + x, window) for x from 0 to num_new."""
    growing = min(max(window - num_cached, 0), num_new)
    return growing * num_cached + growing * growing / 2 + (num_new - growing) * window
