"""Mixtures of experts, whole experts shared among the ranks (Shazeer et al. 2017; Lepikhin et al. 2020).

A token's result does not depend on its batch (C4): a row of the router's softmax is computed by itself, equal
probabilities choose the lower expert, and contributions are added in the order of the experts.
"""

from __future__ import annotations

import dataclasses

import torch

from models.config import ModelConfig
from models.layers.loader import Loader
from models.quant.method import PackedWeight, WeightPart, claim_part
from models.weight_reader import WeightReader

_STACKED = "mlp"  # where transformers 5 has its experts, if it is told to save them as it holds them


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a checkpoint calls the parts, under the name of the block: `<mixture>.experts.<index>.<gate>.weight`."""

    mixture: str
    gate: str
    up: str
    down: str


class Expert:
    """down(activation(gate(x)) * up(x)), all of it on one rank."""

    def __init__(self, loader: Loader, parts: tuple[WeightPart, WeightPart, WeightPart], activation: str) -> None:
        """parts: gate, up, down."""
        self._gate_up = loader.linear(parts[:2])
        self._down = loader.linear(parts[2:])
        self.num_bytes = self._gate_up.num_bytes + self._down.num_bytes
        self._activation = activation
        self._gate_mul = loader.kernels.gate_mul

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, hidden] -> a new [M, hidden]."""
        return self._down.apply(self._gate_mul(self._gate_up.apply(x), self._activation))


class MixtureOfExperts:
    """The weighted sum of the experts that a router chooses for each token.

    Every rank chooses for all tokens, computes what its own experts contribute, and the contributions are
    summed over the ranks. Ranks beyond the number of experts hold none.
    """

    def __init__(self, loader: Loader, config: ModelConfig, names: ExpertNames) -> None:
        """`loader` is scoped to the block.

        num_bytes is what the decoding of one token reads, with its experts spread evenly over the ranks: weights
        of experts that nobody chose are not read.
        """
        assert config.experts is not None
        settings, width = config.experts, config.hidden_size
        self._num_experts, self._num_chosen = settings.num_experts, settings.num_experts_per_token
        self._is_normalised = settings.is_normalised
        self._own = loader.group.share(self._num_experts)
        self._group = loader.group

        is_stacked = loader.reader.has(f"{loader.prefix}{_STACKED}.experts.gate_up_proj")
        mixture = loader.at(_STACKED if is_stacked else names.mixture)
        # Never quantised: a wrong choice costs more than an inexact expert.
        router = mixture.table("gate.weight", (self._num_experts, width), range(self._num_experts))
        self._router = PackedWeight(loader.kernels, loader.kernels.pack(router))
        if is_stacked:
            reader = _StackedExperts(mixture, names, self._num_experts, (settings.intermediate_size, width))
            mixture = dataclasses.replace(mixture, reader=reader)
        self._experts = []
        up_shape, down_shape = (settings.intermediate_size, width), (width, settings.intermediate_size)
        for index in range(self._num_experts):
            expert = mixture.at(f"experts.{index}")
            parts = (
                WeightPart(names.gate, up_shape),
                WeightPart(names.up, up_shape),
                WeightPart(names.down, down_shape),
            )
            if index in self._own:
                self._experts.append(Expert(expert, parts, config.activation))
            else:
                for part in parts:
                    claim_part(expert.reader, dataclasses.replace(part, name=expert.prefix + part.name))
        held = sum(expert.num_bytes for expert in self._experts)
        self.num_bytes = self._router.num_bytes + held * self._num_chosen // self._num_experts

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden] -> residual [M, hidden] with the result added in place; without one, the result."""
        chosen, weights = self.choose(x)
        out = self._group.all_reduce(self._contributions(x, chosen, weights))
        return out if residual is None else residual.add_(out)

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts int64 [M, chosen], the most probable first, and their weights [M, chosen]."""
        probabilities = torch.softmax(self._router.apply(x).float(), dim=-1)
        ordered = probabilities.sort(dim=-1, descending=True, stable=True)
        chosen, weights = (part[:, : self._num_chosen] for part in (ordered.indices, ordered.values))
        if self._is_normalised:
            total = weights[:, 0]
            for i in range(1, self._num_chosen):  # in this order for every M, which a reduction does not promise
                total = total + weights[:, i]
            weights = weights / total.unsqueeze(1)
        return chosen, weights.to(x.dtype)

    def _contributions(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of this rank's experts to every token [M, hidden], added in the experts' order."""
        out = torch.zeros_like(x)
        experts = chosen.flatten()
        by_expert = experts.sort(stable=True).indices
        tokens = by_expert // self._num_chosen
        weights = weights.flatten()[by_expert].unsqueeze(1)
        counts = torch.bincount(experts, minlength=self._num_experts).tolist()
        start = sum(counts[: self._own.start])
        for expert, count in zip(self._experts, counts[self._own.start : self._own.stop], strict=True):
            if count:
                here = slice(start, start + count)
                rows = tokens[here]
                out.index_add_(0, rows, expert(x.index_select(0, rows)).mul_(weights[here]))
            start += count
        return out


class _StackedExperts:
    """A WeightReader that shows [experts, …] tensors as one weight per expert, so that a rank reads its own."""

    def __init__(self, mixture: Loader, names: ExpertNames, num_experts: int, shape: tuple[int, int]) -> None:
        """mixture: scoped loader of the stacked tensors; shape: of one expert's gate, [intermediate, hidden]."""
        self._reader: WeightReader = mixture.reader
        inner, width = shape
        stacked_up = (f"{mixture.prefix}experts.gate_up_proj", (num_experts, 2 * inner, width))
        stacked_down = (f"{mixture.prefix}experts.down_proj", (num_experts, width, inner))
        self._places = {
            f"{mixture.prefix}experts.{index}.{name}.weight": (index, first_row, *stacked)
            for index in range(num_experts)
            for name, first_row, stacked in (
                (names.gate, 0, stacked_up),
                (names.up, inner, stacked_up),
                (names.down, 0, stacked_down),
            )
        }

    @property
    def num_parameters(self) -> int:
        return self._reader.num_parameters

    def has(self, name: str) -> bool:
        return name in self._places

    def claim(self, name: str, shape: tuple[int, ...]) -> None:
        _, _, stacked, stacked_shape = self._places[name]
        self._reader.claim(stacked, stacked_shape)

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        """Whole rows: experts are shared out whole."""
        assert columns is None
        index, first_row, stacked, stacked_shape = self._places[name]
        rows, width = range(shape[0]) if rows is None else rows, stacked_shape[2]
        place = range((first_row + rows.start) * width, (first_row + rows.stop) * width)
        self._reader.read_into(out, stacked, stacked_shape, range(index, index + 1), place)

    def skip(self, prefix: str) -> None:
        self._reader.skip(prefix)
