"""The engine on a GPU: decode at several numbers of streams and prefill, each against the device's own limit.

Made-up weights of known shapes, greedy, end of sequence ignored, prefix cache off. Decode counts wall time between
steps in which every row decodes, scheduling and sampling included, with `--depth` steps in flight. Ceilings are
measured first, in the same process: the limit of a step is its bytes over bandwidth or its operations over rate.
`--profile` writes what the device and the host did in a step.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadtest.bench._engine import Bench
from loadtest.bench._gpu import GpuCeilings, has_gpu, measure_ceilings
from loadtest.bench._random_worker import RandomWorker, random_worker
from loadtest.bench._report import line, report
from models.platform import device_facts
from serving.engine.limit import shape_of
from serving.planning.roofline import decode_time_min, prefill_time_min

WARM_STEPS = 8
SHAPES = ["qwen3-0.6b", "llama-3.1-8b"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench gpu", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="decoded per stream while the clock runs")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192], help="prompt lengths")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per step")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--depth", type=int, nargs="+", default=[1], choices=[0, 1], help="steps in flight")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="0 = greedy")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs as well")
    parser.add_argument(
        "--mixed", type=int, default=32, help="rows that decode while a prompt of 2048 arrives; 0 = none"
    )
    parser.add_argument("--profile", default="", help="a folder for profiles of one decode step")
    options = parser.parse_args(argv)
    if not has_gpu():
        print("not measured: no CUDA device here", file=sys.stderr)
        return 0
    ceilings = measure_ceilings()
    for name in options.shapes:
        bench_shape(name, ceilings, options)
        gc.collect()
    return 0


def bench_shape(name: str, ceilings: GpuCeilings, options: argparse.Namespace) -> None:
    longest = max([*options.prefill, 2048, options.prompt + options.tokens + WARM_STEPS + 600]) + 16
    started = time.perf_counter()
    worker = random_worker(
        name,
        device="cuda",
        max_num_seqs=max(*options.streams, options.mixed + 1),
        max_model_len=longest,
        max_num_batched_tokens=options.budget,
    )
    start_s = time.perf_counter() - started
    facts = device_facts("cuda")
    rows: list[list[str]] = []
    lines: list[dict[str, Any]] = []

    def tell(workload: str, how: str, taken: list[float], size: int, limit_s: float, **more: object) -> None:
        value, limit, spread = size / statistics.median(taken), size / limit_s, (min(taken) * 1e3, max(taken) * 1e3)
        rows.append([workload, how, f"{value:.1f}", f"{statistics.median(taken) * 1e3:.3f}"])
        rows[-1] += [f"{spread[0]:.3f}–{spread[1]:.3f}", f"{limit_s * 1e3:.3f}", f"{value / limit:.1%}"]
        more |= {"ceilings": ceilings.as_json(), "n": len(taken), "shape": name, "how": how}
        more |= {"limit": round(limit, 1), "fraction": round(value / limit, 4), "device": facts.name}
        lines.append(line(bench=workload, value=round(value, 1), unit="tok/s", **more))

    shape = shape_of(worker)
    ways = [True, False] if options.eager else [True]
    for streams in options.streams:
        contexts = [options.prompt + WARM_STEPS + options.tokens // 2] * streams
        limit_s = decode_time_min(shape, contexts, ceilings.ceilings)
        for has_graphs in ways:
            use_graphs(worker, has_graphs)
            for depth in options.depth:
                for temperature in options.temperature:
                    how = f"{'graphs' if has_graphs else 'eager'}, depth {depth}"
                    how += f", temperature {temperature}" if temperature else ""
                    taken = [decode_step_s(worker, streams, depth, temperature, options) for _ in range(options.repeat)]
                    tell(f"decode {streams}", how, taken, streams, limit_s)
        use_graphs(worker, True)
        if options.profile:
            profile(worker, streams, Path(options.profile) / f"{name}-{streams}.txt", options)
    for length in options.prefill:
        taken = [prefill_s(worker, length, options) for _ in range(options.repeat + 1)][1:]
        tell(f"prefill {length}", "graphs", taken, length, prefill_time_min(shape, length, 0, ceilings.ceilings))
    if options.mixed:
        for has_graphs in ways:
            use_graphs(worker, has_graphs)
            steady, longest_s = interference(worker, options)
            how = "graphs" if has_graphs else "eager"
            rows.append([f"{options.mixed} rows + a prompt of 2048", how, "", f"{longest_s * 1e3:.3f}"])
            rows[-1] += [f"steady {steady * 1e3:.3f}", "", ""]
            more = {"steady_ms": round(steady * 1e3, 3), "shape": name, "how": how, "device": facts.name}
            lines.append(line(bench=f"mixed {options.mixed}", value=round(longest_s * 1e3, 3), unit="ms", **more))
    title = (
        f"{name}, {facts.name}, torch {torch.__version__}, {worker.found.kernels}, ready in {start_s:.1f} s, KV cache "
        f"{worker.found.kv_cache_bytes / 1e9:.1f} GB of {facts.memory_bytes / 1e9:.1f}; ceilings {ceilings.as_json()}"
    )
    report(title, ["workload", "how", "tok/s", "ms", "min–max", "limit ms", "fraction"], rows, lines)


def use_graphs(worker: RandomWorker, is_on: bool) -> None:
    if hasattr(worker.runner, "use_graphs"):
        worker.runner.use_graphs = is_on


def decoding(worker: RandomWorker, streams: int, depth: int, temperature: float, options: argparse.Namespace) -> Bench:
    """An engine in which all rows have their prompts behind them."""
    bench = Bench(worker, options.budget, async_depth=depth)
    for handle in range(streams):
        longest = worker.max_model_len - options.prompt - 1
        bench.add(handle, bench.random_prompt(handle, options.prompt), longest, temperature=temperature)
    while any(bench.scheduler.rows.num_done[:streams] < options.prompt) or bench.scheduler.num_waiting:
        bench.core.step()
    for _ in range(WARM_STEPS):
        bench.core.step()
    return bench


def decode_step_s(
    worker: RandomWorker, streams: int, depth: int, temperature: float, options: argparse.Namespace
) -> float:
    """Mean seconds of a step in which every row decodes, everything between steps included."""
    bench = decoding(worker, streams, depth, temperature, options)
    started = time.perf_counter()
    for _ in range(options.tokens):
        bench.core.step()
    taken = (time.perf_counter() - started) / options.tokens
    assert bench.scheduler.num_running == streams, "a row ended while the clock ran"
    bench.drain()
    return taken


def prefill_s(worker: RandomWorker, length: int, options: argparse.Namespace) -> float:
    """Seconds from a prompt's arrival to its first token."""
    bench = Bench(worker, options.budget)
    prompt = bench.random_prompt(0, length)
    bench.add(0, prompt, 1)
    started = time.perf_counter()
    bench.run()
    return time.perf_counter() - started


def interference(worker: RandomWorker, options: argparse.Namespace) -> tuple[float, float]:
    """(a step without, the longest step with) parts of a prompt in it, in seconds."""
    bench = decoding(worker, options.mixed, max(options.depth), 0.0, options)
    for _ in range(32):
        bench.core.step()
    steady = float(np.median(bench.core.records.last(16)["duration_s"]))
    for handle in range(3):  # the first ones teach the cost model
        bench.add(1000 + handle, bench.random_prompt(handle, 2048), 1)
        before = bench.core.num_steps
        while not bench.tokens[1000 + handle]:
            bench.core.step()
    longest = float(bench.core.records.last(bench.core.num_steps - before)["duration_s"].max())
    bench.drain()
    return steady, longest


def profile(worker: RandomWorker, streams: int, path: Path, options: argparse.Namespace) -> None:
    """Kernels by time and the host's functions by time, of steady decoding."""
    depth, num_steps = max(options.depth), 10
    bench = decoding(worker, streams, depth, 0.0, options)
    started = time.perf_counter()
    for _ in range(num_steps):
        bench.core.step()
    wall = (time.perf_counter() - started) / num_steps
    with torch.profiler.profile() as traced:
        for _ in range(num_steps):
            bench.core.step()
        torch.accelerator.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in traced.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
    busy = sum(map(sum, kernels.values())) / num_steps
    host = cProfile.Profile()
    host.enable()
    for _ in range(num_steps):
        bench.core.step()
    host.disable()
    bench.drain()
    text = io.StringIO()
    print(f"step {wall * 1e6:.0f} us of wall time; device busy {busy:.0f} us: {busy / wall / 1e4:.1f} %", file=text)
    by_time = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    for kernel, times in by_time[:25]:
        print(
            f"{sum(times) / num_steps:9.1f} us {len(times) / num_steps:6.1f} calls {np.median(times):8.1f} us each  "
            f"{kernel[:150]}",
            file=text,
        )
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(30)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())
    print("\n".join(text.getvalue().splitlines()[:9]), flush=True)
