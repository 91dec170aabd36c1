"""`argosy plan`: flags to a question, the answer to the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from models.platform import device_facts
from serving.planning.accelerators import ACCELERATORS, Accelerator, Figure
from serving.planning.demand import DTYPE_BYTES, QUANTIZATIONS, Demand, Machine, PlanError
from serving.planning.lookup import find_config
from serving.planning.plan import make_plan
from serving.planning.quantities import parse_bandwidth, parse_memory, parse_rate
from serving.planning.report import as_json, print_choices, print_plan

FITS, NOTHING_FITS = 0, 1
DEFAULT_GPU = "h100-80gb"
_DEFAULT_CONTEXT = 8192
_MAX_GPUS = 16384

Flags = Mapping[str, str | None]
T = TypeVar("T")


def run(model: str | None, flags: Flags, store: Path, console: Console) -> int:
    """Print the plan; the exit code. model: None lists what has a name. Raises PlanError for wrong input."""
    if model is None:
        print_choices(console)
        return FITS
    output = _choice(flags, "output", ("table", "json"), "table")
    machine = _machine(flags)
    plan = make_plan(_demand(model, flags, store, machine.accelerator), machine)
    if output == "json":
        console.file.write(json.dumps(as_json(plan), indent=2) + "\n")
    else:
        print_plan(plan, console)
    return FITS if plan.placements else NOTHING_FITS


def _demand(model: str, flags: Flags, store: Path, accelerator: Accelerator) -> Demand:
    config, stored = find_config(model, store)
    dtype = _choice(flags, "dtype", tuple(DTYPE_BYTES), "bfloat16")
    quantization = _choice(flags, "quantization", ("auto", *QUANTIZATIONS), "auto")
    if stored == "int4" and quantization not in ("auto", "int4"):
        raise PlanError(f"--quantization must be auto or int4: the weights of {model} are stored in int4")
    return Demand(
        name=model,
        config=config,
        context=_count(flags, "context", min(_DEFAULT_CONTEXT, config.max_position_embeddings), 1 << 24),
        max_num_seqs=_count(flags, "max_num_seqs", 32, 1 << 16),
        max_num_batched_tokens=_count(flags, "max_num_batched_tokens", 256 if accelerator.is_cpu else 2048, 1 << 20),
        dtype=dtype,
        has_stored_codes=stored == "int4",
        quantization=stored if quantization == "auto" else quantization,
        kv_dtype=_choice(flags, "kv_dtype", ("auto", *DTYPE_BYTES), "auto").replace("auto", dtype),
    )


def _machine(flags: Flags) -> Machine:
    accelerator = _accelerator(flags)
    return Machine(
        accelerator,
        _count(flags, "gpus", 1, _MAX_GPUS),
        # The figures of cpu are a whole machine's; ranks that share one have no more than it has.
        _count(flags, "gpus_per_node", 1 if accelerator.is_cpu else 8, _MAX_GPUS),
    )


def _accelerator(flags: Flags) -> Accelerator:
    """A named device with what the flags say instead; without a name, all that decides must be said."""
    memory = _parsed(flags, "memory", parse_memory)
    bandwidth = _parsed(flags, "bandwidth", parse_bandwidth)
    rate = _parsed(flags, "flops", parse_rate)
    link = _parsed(flags, "link", parse_bandwidth)
    name = flags.get("gpu")
    if name is None and memory is not None and bandwidth is not None and rate is not None:
        found = Accelerator("device", None, Figure(0.0), None, None, None, None, None)
    else:
        found = ACCELERATORS[_choice(flags, "gpu", tuple(ACCELERATORS), DEFAULT_GPU)]
    if found.is_cpu and memory is None:
        total = float(device_facts("cpu").memory_bytes)
        found = dataclasses.replace(found, memory_bytes=Figure(total, "found"))
    if memory is not None:
        found = dataclasses.replace(found, memory_bytes=Figure(float(memory), "given"))
    if bandwidth is not None:
        found = dataclasses.replace(found, bandwidth=Figure(bandwidth, "given"))
    if link is not None:
        found = dataclasses.replace(found, link=Figure(link, "given"))
    if rate is not None:  # of whatever arithmetic is asked for
        given = Figure(rate, "given")
        found = dataclasses.replace(found, bf16=given, fp32=given, int8=given)
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _choice(flags: Flags, name: str, allowed: tuple[str, ...], default: str) -> str:
    value = flags.get(name)
    if value is None:
        return default
    if value not in allowed:
        raise PlanError(f"{_flag(name)} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def _count(flags: Flags, name: str, default: int, limit: int) -> int:
    text = flags.get(name)
    if text is None:
        return default
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if not 1 <= value <= limit:
        raise PlanError(f"{_flag(name)} must be a whole number from 1 to {limit}; got {text!r}")
    return value


def _parsed(flags: Flags, name: str, parse: Callable[[str], T]) -> T | None:
    text = flags.get(name)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise PlanError(f"{_flag(name)}: {error}; got {text!r}") from error
