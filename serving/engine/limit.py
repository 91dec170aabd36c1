"""What the hardware would allow at best for a step: its ideal cost (C17), from the planner's formulas.

Counted are the weights that a step reads, the keys and values of its contexts and the arithmetic of linears and
attention, each at this rank's ceilings, whichever of bytes and operations takes longer. Not counted: sampling,
norms, activations and what ranks send each other. A mixture's experts are counted as expected when tokens choose
evenly and independently: rows that choose alike read less, and may go beyond the limit by that.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import torch

from models.config import ModelError
from models.footprint import Place, count_parameters, expert_layers, heads_of_rank, layers_of_stage, share
from models.footprint import num_experts_of_rank as experts_of_rank
from serving.config import EngineSettings
from serving.engine.ceilings import measure
from serving.engine.request import Int32Array
from serving.engine.worker import PhaseCallback, Worker
from serving.planning.roofline import Ceilings, ExpertShape, Shape, step_time_min


class StepLimit:
    """Of one rank of one stage."""

    def __init__(self, shape: Shape, ceilings: Ceilings) -> None:
        self.shape = shape
        self.ceilings = ceilings
        self._windows = tuple(Counter(shape.windows or (0,) * shape.num_layers).items())

    def seconds(self, starts: Int32Array, num_tokens: Int32Array, num_logits: int) -> float:
        """starts [R]: tokens before the step's own of each row; num_tokens [R]: those of the step."""
        is_prefill = num_tokens > 1
        if is_prefill.any():
            contexts, new, before = starts[~is_prefill], num_tokens[is_prefill], starts[is_prefill]
            prompt_pairs, cached_pairs = self._prompt_pairs(new.astype(np.float64), before)
            num_new = int(num_tokens.sum())
        else:
            contexts, prompt_pairs, cached_pairs, num_new = starts, 0.0, 0.0, len(starts)
        return step_time_min(
            self.shape,
            self.ceilings,
            num_tokens=num_new,
            num_logits=num_logits,
            decode_pairs=self._decode_pairs(contexts),
            prompt_pairs=prompt_pairs,
            cached_pairs=cached_pairs,
        )

    def _decode_pairs(self, contexts: Int32Array) -> float:
        """(layer, cached token) pairs that one new token after each context sees."""
        return float(
            sum(
                count * int((np.minimum(contexts, window - 1) if window else contexts).sum())
                for window, count in self._windows
            )
        )

    def _prompt_pairs(self, new: np.typing.NDArray[np.float64], before: Int32Array) -> tuple[float, float]:
        """(layer, new token, token it sees) triples, and the (layer, cached token) pairs read for them."""
        pairs = cached = 0.0
        for window, count in self._windows:
            if window:
                growing = np.clip(window - before, 0, new)
                seen = growing * before + growing * growing / 2 + (new - growing) * window
                cached += count * float(np.minimum(before, window - 1).sum())
            else:
                seen = new * before + new * new / 2
                cached += count * float(before.sum())
            pairs += count * float(seen.sum())
        return pairs, cached


def find_limit(settings: EngineSettings, worker: Worker, on_phase: PhaseCallback) -> StepLimit | None:
    """The limit of rank 0's share; None where it is not known rather than invented.

    Not known: pipelines, whose steps overlap; architectures without an account of their weights; gangs whose
    rates are not given, for what one rank measures alone is not what it has beside the others.
    """
    given_read, given_flops = settings.read_limit_gb_s, settings.compute_limit_tflops
    is_given = given_read is not None and given_flops is not None
    if settings.pipeline_parallel_size > 1 or (settings.tensor_parallel_size > 1 and not is_given):
        return None
    try:
        shape = shape_of(worker)
    except ModelError:
        return None
    if given_read is not None and given_flops is not None:
        return StepLimit(shape, Ceilings(given_read * 1e9, given_flops * 1e12))
    is_integer = worker.model.weight_format in ("int8", "int4")
    begun = time.perf_counter()
    found = measure(torch.device(settings.device), worker.model.weight_bytes, is_integer=is_integer)
    on_phase("hardware limit", time.perf_counter() - begun)
    read_bytes_s = found.read_bytes_s if given_read is None else given_read * 1e9
    if given_flops is not None:
        return StepLimit(shape, Ceilings(read_bytes_s, given_flops * 1e12))
    return StepLimit(shape, Ceilings(read_bytes_s, found.flops_s, found.attention_flops_s))


def shape_of(worker: Worker) -> Shape:
    """Rank 0's share of the model. Raises ModelError for an architecture without an account."""
    config = worker.config
    place = Place(tensor_size=worker.settings.tensor_parallel_size)
    whole, held = count_parameters(config), share(config, place, worker.max_model_len)
    layers = layers_of_stage(config, place)
    heads, kv_heads = heads_of_rank(config, place.tensor_size)
    head = -(-whole.head // place.tensor_size)
    experts = None
    if config.experts is not None:
        per_layer = whole.expert // max(expert_layers(config, range(config.num_layers)), 1)
        experts = ExpertShape(
            config.experts.num_experts,
            experts_of_rank(config, place),
            config.experts.num_experts_per_token,
            per_layer * expert_layers(config, layers),
        )
    in_experts = experts.num_held * experts.parameters if experts else 0
    body = max(held.linear + held.plain - head - in_experts, 0)
    return Shape(
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=config.head_size,
        body_parameters=body,
        head_parameters=head,
        # The model says what one token reads, and of a mixture's experts that is what the token chooses.
        weight_bytes=worker.model.weight_bytes / (body + head + (experts.multiplied if experts else 0.0)),
        kv_bytes=getattr(torch, worker.settings.dtype).itemsize,
        windows=config.windows[layers.start : layers.stop],
        experts=experts,
    )
