"""What the hardware would allow at best for a step: its ideal cost (C17), from the planner's formulas.

Counted are the weights that a step reads, the keys and values of its contexts and the arithmetic of linears and
attention, each at this rank's ceilings, whichever of bytes and operations takes longer. Not counted: sampling,
norms, activations and what ranks send each other. A mixture's experts are counted as expected when tokens choose
evenly and independently: rows that choose alike read less, and may go beyond the limit by that.
"""

from __future__ import annotations

import logging
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
from serving.planning.roofline import Ceilings, ExpertShape, Shape, banded, step_time_min

log = logging.getLogger(__name__)


class StepLimit:
    """Of one rank of one stage."""

    def __init__(self, shape: Shape, ceilings: Ceilings) -> None:
        self.shape = shape
        self.ceilings = ceilings
        self._windows = tuple(Counter(shape.windows or (0,) * shape.num_layers).items())

    def seconds(self, starts: Int32Array, num_tokens: Int32Array, num_samples: Int32Array, num_prefill: int) -> float:
        """The ideal cost of a step; its four lists as in the plan, all [R].

        starts: tokens before the step's own. num_prefill: tokens of rows with more than one.
        Measured 3 µs for a step that only decodes, 6 µs for one with a part of a prompt.
        """
        num_rows = len(starts)
        decode_pairs = self._decode_pairs(starts)
        if num_prefill == 0:
            return step_time_min(
                self.shape, self.ceilings, num_tokens=num_rows, num_logits=num_rows, decode_pairs=decode_pairs
            )
        prompt_pairs = cached_pairs = 0.0
        prompts = np.flatnonzero(num_tokens > 1).tolist()
        for at in prompts:
            before, new = int(starts[at]), int(num_tokens[at])
            for window, count in self._windows:
                cached_pairs += count * (min(before, window - 1) if window else before)
                prompt_pairs += count * (banded(new, before, window) if window else new * before + new * new / 2)
        return step_time_min(
            self.shape,
            self.ceilings,
            num_tokens=num_prefill + num_rows - len(prompts),
            num_logits=int(np.count_nonzero(num_samples)),
            decode_pairs=decode_pairs - cached_pairs,
            prompt_pairs=prompt_pairs,
            cached_pairs=cached_pairs,
        )

    def _decode_pairs(self, contexts: Int32Array) -> float:
        """(layer, cached token) pairs that one new token after each context sees."""
        pairs = 0
        for window, count in self._windows:
            pairs += count * int((np.minimum(contexts, window - 1) if window else contexts).sum())
        return float(pairs)


def find_limit(settings: EngineSettings, worker: Worker, on_phase: PhaseCallback) -> StepLimit | None:
    """The limit of rank 0's share; None where it is not known rather than invented.

    Not known: pipelines, whose steps overlap; architectures without an account of their weights; devices that
    cannot be measured; gangs whose
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
    try:
        found = measure(torch.device(settings.device), worker.model.weight_bytes, is_integer=is_integer)
    except RuntimeError as error:
        log.warning("the hardware's limit is not known: %s", error)
        return None
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
