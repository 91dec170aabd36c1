"""How fast a placement could be: the roofline of every stage, and what its ranks send each other."""

from __future__ import annotations

import dataclasses

from models.footprint import (
    Parameters,
    Place,
    Share,
    count_parameters,
    expert_layers,
    heads_of_rank,
    layers_of_stage,
    num_experts_of_rank,
)
from serving.planning.demand import Demand, Machine, activation_bytes, attention_rate, linear_rate, precision_of
from serving.planning.roofline import Ceilings, ExpertShape, Shape, decode_time_min, prefill_time_min

_LOGIT_BYTES = 4
_SUMS_PER_LAYER = 2  # over the ranks: after attention, after the feed-forward network


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeLimit:
    """Of one replica with `batch` rows, each with the asked context before it."""

    batch: int
    inter_token_s: float
    tokens_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillLimit:
    """Of one replica over prompts of the asked context."""

    first_token_s: float
    tokens_s: float


class Limits:
    """Of one placement; `slowest` holds the fullest rank of every stage with its share."""

    def __init__(self, demand: Demand, machine: Machine, slowest: list[tuple[Place, Share]]) -> None:
        accelerator = machine.accelerator
        self._demand = demand
        self._link = accelerator.link.value if accelerator.link else None
        self._activation_bytes = activation_bytes(demand, accelerator)
        self._places = [place for place, _ in slowest]
        parameters = count_parameters(demand.config)
        self._shapes = [_shape(demand, machine, parameters, place, share) for place, share in slowest]
        self._ceilings = Ceilings(
            accelerator.bandwidth.value,
            linear_rate(demand, accelerator).value,
            attention_rate(demand, accelerator).value,
        )

    def decode(self, batch: int) -> DecodeLimit:
        """Rows form as many groups as stages and follow each other through them, so a token takes one round: all
        stages once, or the slowest as often as there are groups."""
        num_groups = min(len(self._places), batch)
        contexts = [self._demand.context] * -(-batch // num_groups)
        stages = [
            decode_time_min(shape, contexts, self._ceilings) + self._sending(place, len(contexts), len(contexts))
            for place, shape in zip(self._places, self._shapes, strict=True)
        ]
        seconds = max(sum(stages), num_groups * max(stages))
        return DecodeLimit(batch, seconds, batch / seconds)

    def prefill(self) -> PrefillLimit:
        """Prompts follow each other through the stages."""
        num_tokens = self._demand.context
        stages = [
            prefill_time_min(shape, num_tokens, 0, self._ceilings) + self._sending(place, num_tokens, 1)
            for place, shape in zip(self._places, self._shapes, strict=True)
        ]
        return PrefillLimit(sum(stages), num_tokens / max(stages))

    def _sending(self, place: Place, num_tokens: int, num_logits: int) -> float:
        """Seconds of a step in which a stage's rank receives: an exact sum is a gather of all parts (C4)."""
        if self._link is None or place.tensor_size == 1:
            return 0.0
        config, others = self._demand.config, place.tensor_size - 1
        sums = _SUMS_PER_LAYER * len(layers_of_stage(config, place)) + (place.stage == 0)  # the embedding's
        received = sums * others * num_tokens * config.hidden_size * self._activation_bytes
        if place.stage == place.pipeline_size - 1:
            received += num_logits * config.vocab_size * others // place.tensor_size * _LOGIT_BYTES
        return received / self._link


def _shape(demand: Demand, machine: Machine, whole: Parameters, place: Place, share: Share) -> Shape:
    """One rank's share as the formulas see it."""
    config = demand.config
    layers = layers_of_stage(config, place)
    heads, kv_heads = heads_of_rank(config, place.tensor_size)
    is_last = place.stage == place.pipeline_size - 1
    parameters = share.linear + share.plain
    head = -(-whole.head // place.tensor_size) if is_last else 0
    experts = None
    if config.experts is not None:
        experts = ExpertShape(
            config.experts.num_experts,
            num_experts_of_rank(config, place),
            config.experts.num_experts_per_token,
            whole.expert * expert_layers(config, layers) // max(expert_layers(config, range(config.num_layers)), 1),
        )
    in_experts = experts.num_held * experts.parameters if experts else 0
    return Shape(
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=config.head_size,
        body_parameters=max(parameters - head - in_experts, 0),
        head_parameters=head,
        weight_bytes=share.linear_bytes(precision_of(demand, machine.accelerator)) / parameters,
        kv_bytes=demand.kv_bytes,
        windows=config.windows[layers.start : layers.stop],
        experts=experts,
    )
