"""A plan as tables for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from serving.planning.accelerators import ACCELERATORS, Accelerator, Figure
from serving.planning.placements import Placement, RankMemory
from serving.planning.plan import Plan
from serving.planning.quantities import shown_bytes
from serving.planning.shapes import SHAPES

VERSION = 1
"""Of the JSON: fields are only added while it stays."""

_CEILINGS = {"memory": 1e9, "read": 1e9, "bf16": 1e12, "int8": 1e12, "fp8": 1e12, "fp32": 1e12, "link": 1e9}


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and tokens per second as plain numbers."""
    demand, config = plan.demand, plan.demand.config
    return {
        "version": VERSION,
        "model": {
            "name": demand.name,
            "model_type": config.model_type,
            "parameters": plan.parameters.total,
            "active_parameters": plan.parameters.active,
            "weight_bytes": plan.weight_bytes,
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "max_context": config.max_position_embeddings,
        },
        "demand": {
            "dtype": demand.dtype,
            "quantization": demand.quantization,
            "kv_dtype": demand.kv_dtype,
            "context": demand.context,
            "max_num_seqs": demand.max_num_seqs,
            "max_num_batched_tokens": demand.max_num_batched_tokens,
        },
        "machine": {
            "accelerator": _accelerator(plan.machine.accelerator),
            "gpus": plan.machine.num_gpus,
            "gpus_per_node": plan.machine.gpus_per_node,
        },
        "fits": bool(plan.placements),
        "placements": [_placement(placement) for placement in plan.placements],
        "refused": [
            {
                "tensor_parallel_size": refusal.tensor_size,
                "pipeline_parallel_size": refusal.pipeline_size,
                "reason": refusal.reason,
                "missing_bytes": refusal.missing_bytes,
            }
            for refusal in plan.refused
        ],
        "assumptions": plan.assumptions,
    }


def print_plan(plan: Plan, console: Console) -> None:
    demand, machine, parameters = plan.demand, plan.machine, plan.parameters
    active = f", {parameters.active:,} active per token" if parameters.active != parameters.total else ""
    form = demand.dtype if demand.quantization == "none" else f"{demand.dtype}, linears in {demand.quantization}"
    _say(console, f"[bold]{demand.name}[/]: {parameters.total:,} parameters{active}")
    _say(
        console,
        f"{form}: {shown_bytes(plan.weight_bytes)} of weights, {plan.kv_bytes_per_token:,} B of KV cache per token, "
        f"context {demand.context:,} of {demand.config.max_position_embeddings:,}",
    )
    _say(console, f"on {machine.num_gpus} x {machine.accelerator.name}, {machine.gpus_per_node} per node\n")
    if plan.placements:
        _print_placements(plan, console)
        _print_limits(plan.placements[0], console)
    else:
        _say(console, "[bold]Nothing fits.[/]\n")
    if plan.refused:
        table = _table("What does not fit", ("tp", "pp", "why"), left=1)
        for refusal in plan.refused:
            table.add_row(str(refusal.tensor_size), str(refusal.pipeline_size), refusal.reason)
        console.print(table)
    _say(console, "[bold]Assumed[/]")
    for assumption in plan.assumptions:
        _say(console, f"- {assumption}")


def print_choices(console: Console) -> None:
    """Shapes and devices that have a name."""
    _say(console, "[bold]Shapes[/]")
    console.print(", ".join(SHAPES) + "\n", highlight=False)
    table = _table("Devices (memory GB, reads and link GB/s, arithmetic TFLOP/s)", ("--gpu", *_CEILINGS))
    for accelerator in ACCELERATORS.values():
        figures = (
            accelerator.memory_bytes,
            accelerator.bandwidth,
            accelerator.bf16,
            accelerator.int8,
            accelerator.fp8,
            accelerator.fp32,
            accelerator.link,
        )
        shown = (_shown(figure, unit) for figure, unit in zip(figures, _CEILINGS.values(), strict=True))
        table.add_row(accelerator.name, *shown)
    console.print(table)
    _say(console, "* measured by this project; all others are the vendor's. The memory of cpu is this machine's.")


def _print_placements(plan: Plan, console: Console) -> None:
    names = ("tp", "pp", "replicas", "weights", "KV B/tok", "KV tokens", "contexts", "tok/s", "ms/tok", "rows")
    table = _table("What fits: weights and KV per rank, tok/s of all replicas together", names)
    for placement in plan.placements:
        last = placement.decode[-1]
        idle = f" ({placement.num_idle} idle)" if placement.num_idle else ""
        table.add_row(
            str(placement.tensor_size),
            str(placement.pipeline_size),
            f"{placement.num_replicas}{idle}",
            shown_bytes(placement.fullest.weights),
            f"{placement.tightest.kv_per_token:,}",
            f"{placement.kv_tokens:,}",
            f"{placement.num_contexts:,}",
            f"{placement.total_tokens_s:,.0f}",
            f"{last.inter_token_s * 1e3:.2f}",
            str(last.batch),
        )
    console.print(table)


def _print_limits(best: Placement, console: Console) -> None:
    title = f"Limits of one replica at tp {best.tensor_size}, pp {best.pipeline_size}"
    table = _table(title, ("workload", "tok/s", "ms per token or prompt"))
    for limit in best.decode:
        table.add_row(f"decode at {limit.batch}", f"{limit.tokens_s:,.1f}", f"{limit.inter_token_s * 1e3:.2f}")
    table.add_row("prefill", f"{best.prefill.tokens_s:,.0f}", f"{best.prefill.first_token_s * 1e3:,.2f}")
    console.print(table)


def _say(console: Console, text: str) -> None:
    """As one line: a terminal wraps it, and a pipe gets it whole."""
    console.print(text, highlight=False, soft_wrap=True)


def _table(title: str, names: tuple[str, ...], left: int = 0) -> Table:
    """Numbers to the right; the last `left` columns are text."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for i, name in enumerate(names):
        is_text = i >= len(names) - left
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    return table


def _shown(figure: Figure | None, unit: float) -> str:
    if figure is None:
        return "-"
    return f"{figure.value / unit:,.4g}{'*' if figure.source == 'measured' else ''}"


def _placement(placement: Placement) -> dict[str, Any]:
    return {
        "tensor_parallel_size": placement.tensor_size,
        "pipeline_parallel_size": placement.pipeline_size,
        "replicas": placement.num_replicas,
        "idle_gpus": placement.num_idle,
        "weight_bytes": placement.weight_bytes,
        "fullest_rank": _rank(placement.fullest),
        "tightest_rank": _rank(placement.tightest),
        "kv_tokens": placement.kv_tokens,
        "contexts": placement.num_contexts,
        "total_tokens_s": placement.total_tokens_s,
        "decode": [dataclasses.asdict(limit) for limit in placement.decode],
        "prefill": dataclasses.asdict(placement.prefill),
    }


def _rank(rank: RankMemory) -> dict[str, int]:
    return {
        "tensor_rank": rank.place.tensor_rank,
        "stage": rank.place.stage,
        "weight_bytes": rank.weights,
        "workspace_bytes": rank.workspace,
        "usable_bytes": rank.usable,
        "kv_cache_bytes": rank.free,
        "kv_bytes_per_token": rank.kv_per_token,
    }


def _accelerator(accelerator: Accelerator) -> dict[str, Any]:
    return dataclasses.asdict(accelerator)
