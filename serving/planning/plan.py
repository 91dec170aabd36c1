"""The answer to "what does this model need, and how fast could it be here?"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from models.config import ModelError
from models.footprint import Parameters, Place, count_parameters, kv_bytes_per_token, share
from serving.planning.accelerators import Figure
from serving.planning.demand import (
    BLOCK_SIZE,
    Demand,
    Machine,
    PlanError,
    attention_rate,
    linear_rate,
    precision_of,
)
from serving.planning.placements import RUNTIME_BYTES, USABLE, Placement, Refusal, find_placements
from serving.planning.quantities import shown_bandwidth, shown_bytes, shown_rate
from serving.planning.shapes import NOTES


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    demand: Demand
    machine: Machine
    parameters: Parameters
    weight_bytes: int  # on one rank that holds everything
    kv_bytes_per_token: int  # likewise
    placements: list[Placement]  # best first
    refused: list[Refusal]
    assumptions: list[str]


def make_plan(demand: Demand, machine: Machine) -> Plan:
    """Raises PlanError when the question cannot be answered; a plan without placements is an answer."""
    try:
        placements, refused = find_placements(demand, machine)
        whole = share(demand.config, Place(), demand.context)
    except ModelError as error:
        raise PlanError(str(error)) from error
    return Plan(
        demand,
        machine,
        count_parameters(demand.config),
        whole.num_bytes(precision_of(demand, machine.accelerator)),
        kv_bytes_per_token(demand.config, Place(), demand.kv_bytes),
        placements,
        refused,
        list(_assumptions(demand, machine)),
    )


def _assumptions(demand: Demand, machine: Machine) -> Iterator[str]:
    accelerator, config = machine.accelerator, demand.config
    linears, attention = linear_rate(demand, accelerator), attention_rate(demand, accelerator)
    yield (
        f"Ceilings of {accelerator.name}: memory reads {_figure(accelerator.bandwidth, shown_bandwidth)}, linears "
        f"{_figure(linears, shown_rate)}, attention {_figure(attention, shown_rate)}."
    )
    yield (
        "Limits are bytes over bandwidth or operations over rate, whichever is longer. Launches, sampling, scheduling "
        "and the gateway are not in them: no engine reaches them."
    )
    yield f"Every row has {demand.context:,} tokens before it, the longest that was asked for; prompts have as many."
    runtime = shown_bytes(RUNTIME_BYTES[accelerator.is_cpu])
    yield (
        f"{USABLE:.0%} of a device's memory is used. Of it, each rank keeps {runtime} for the runtime, the widest "
        f"layer's activations of {demand.max_num_batched_tokens:,} tokens, and, in the last stage, logits of "
        f"{demand.max_num_seqs:,} rows twice in float32."
    )
    yield (
        f"The KV cache has blocks of {BLOCK_SIZE} tokens in {demand.kv_dtype}. Tables of positions reach to the asked "
        "context. Packed weights are counted without padding."
    )
    if accelerator.is_cpu:
        yield "A cpu is a whole machine: its memory, reads and arithmetic are what all ranks on it have together."
    yield _about_links(machine)
    if config.tie_word_embeddings:
        yield "The tied head is held twice: as a table for the embedding, and packed for multiplication."
    if any(config.windows):
        yield "Layers with a window keep the whole context in the cache and read only their window."
    if config.experts is not None:
        yield "Tokens choose experts evenly and independently; ranks hold whole experts."
    if demand.kv_dtype != demand.dtype:
        yield f"The engine keeps its KV cache in the type of the weights: {demand.kv_dtype} is a what-if."
    if not accelerator.is_cpu:
        yield "The CUDA path of this version is not measured: these are limits of the hardware, not of the engine."
    if not accelerator.is_cpu and demand.quantization == "int4":
        yield "int4 saves memory reads, not operations: on a GPU it multiplies at the rate of bfloat16."
    if demand.quantization == "int4":
        yield "int4 has a scale and an offset per 32 inputs; weights whose inputs are no whole groups stay as they are."
    if demand.name in NOTES:
        yield f"{NOTES[demand.name]}."


def _about_links(machine: Machine) -> str:
    link = machine.accelerator.link
    if link is None:
        return "What tensor-parallel ranks and pipeline stages send each other is not counted."
    return (
        f"Tensor-parallel ranks receive {_figure(link, shown_bandwidth)}; a sum over ranks, two per layer, gathers "
        "every rank's part, so that it is exact. Latencies, and what stages send, are not counted."
    )


def _figure(figure: Figure, shown: Callable[[float], str]) -> str:
    return f"{shown(figure.value)} ({figure.source})"
