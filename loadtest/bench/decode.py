"""Decode throughput at 1, 8 and 32 streams and prefill throughput of every weight format, each against its own limit.

Greedy, end of sequence ignored, prefix cache off, prompt of 128 tokens. Decode counts wall time from the first
step in which every row decodes to the last, scheduling and sampling included. The limit is the format's bytes over
bandwidth or operations over the rate of its arithmetic (int8 and int4: int8 products), with ceilings sampled between
the workloads; when they move by more than 5 % the fractions are marked unstable. Formats take turns within every
repetition. The peer is transformers' bf16 model with a static batch, best of its trials.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from loadtest.bench._ceilings import CeilingMeter
from loadtest.bench._engine import Bench
from loadtest.bench._formats import FORMATS, add_model_options, load_worker
from loadtest.bench._peer import TransformersPeer, find_peer
from loadtest.bench._report import line, report
from serving.engine.limit import shape_of
from serving.engine.worker import Worker
from serving.planning.roofline import decode_time_min, prefill_time_min

PROMPT = 128
BUDGET = 256  # tokens per step


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench decode", description=__doc__)
    add_model_options(parser, ["bf16", "int8", "int4"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="decoded per stream")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512], help="prompt lengths")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peer-repeat", type=int, default=2, help="0 leaves the peer out")
    options = parser.parse_args(argv)
    longest = max(max(options.prefill), PROMPT + options.tokens + slack(max(options.streams))) + 16
    loaded = {
        name: load_worker(
            options, FORMATS[name], max_num_seqs=max(options.streams), max_model_len=longest, budget=BUDGET
        )
        for name in options.formats
    }
    workers = {name: worker for name, worker in loaded.items() if worker is not None}
    meter = CeilingMeter(max(worker.model.weight_bytes for worker in workers.values()))
    workloads = [("decode", streams) for streams in options.streams] + [("prefill", size) for size in options.prefill]
    times: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(options.repeat + 1):  # interleaved; the first is discarded
        for kind, size in workloads:
            meter.sample()
            for name, worker in workers.items():
                taken = decode_step_s(worker, size, options.tokens) if kind == "decode" else prefill_s(worker, size)
                times.setdefault((name, kind, size), []).append(taken)
    peer = find_peer(Path(next(iter(workers.values())).settings.model_dir), "bfloat16") if options.peer_repeat else None
    theirs = {} if peer is None else peer_rates(peer, workloads, options)
    tell(workers, times, meter, theirs, peer, options)
    return 0


def peer_rates(
    peer: TransformersPeer, workloads: list[tuple[str, int]], options: argparse.Namespace
) -> dict[tuple[str, int], float]:
    """Tokens per second by workload, the best of all trials."""
    rates = {}
    for kind, size in workloads:
        trials = range(options.peer_repeat)
        if kind == "decode":
            best = min(peer.decode_step_s(size, PROMPT, options.tokens // 2) for _ in trials)
        else:
            best = min(peer.prefill_s(size) for _ in trials)
        rates[kind, size] = size / best
    return rates


def tell(
    workers: dict[str, Worker],
    times: dict[tuple[str, str, int], list[float]],
    meter: CeilingMeter,
    theirs: dict[tuple[str, int], float],
    peer: TransformersPeer | None,
    options: argparse.Namespace,
) -> None:
    rows, lines = [], []
    spread, model = meter.spread, next(iter(workers.values()))
    name_of_shape = Path(model.settings.model_dir).name
    for (name, kind, size), measured in times.items():
        worker, kept = workers[name], measured[1:]
        shape, ceilings = shape_of(worker), meter.ceilings(is_integer=FORMATS[name].quantization != "none")
        if kind == "decode":
            limit_s = decode_time_min(shape, [PROMPT + options.tokens // 2] * size, ceilings)
        else:
            limit_s = prefill_time_min(shape, size, 0, ceilings)
        value, limit = size / statistics.median(kept), size / limit_s
        against = theirs.get((kind, size)) if name == "bf16" else None
        between = f"{size / max(kept):.1f}–{size / min(kept):.1f}"
        rows.append([f"{kind} {size}", name, f"{value:.1f}", between, f"{limit:.1f}", f"{value / limit:.0%}"])
        rows[-1].append("" if against is None else f"{against:.1f}")
        lines.append(
            line(
                bench=f"{kind} {size}",
                value=round(value, 2),
                unit="tok/s",
                limit=round(limit, 2),
                fraction=round(value / limit, 3),
                ceilings=ceilings.as_json(),
                ceiling_spread=round(spread, 3),
                peer=None
                if peer is None or against is None
                else {"engine": peer.name, "version": peer.version, "value": round(against, 2)},
                n=options.repeat,
                shape=name_of_shape,
                fmt=name,
                weight_bytes=worker.model.weight_bytes,
                kernels=worker.found.kernels,
                threads=worker.found.num_threads,
            )
        )
    stable = "" if spread <= 0.05 else f"; UNSTABLE: ceilings moved by {spread:.0%} during the run"
    plain, integer = meter.ceilings(), meter.ceilings(is_integer=True)
    title = (
        f"{name_of_shape}, {model.found.kernels}, {model.found.num_threads} threads; ceilings "
        f"{plain.read_bytes_s / 1e9:.1f} GB/s, {plain.flops_s / 1e9:.0f} GFLOP/s, "
        f"int8 {integer.flops_s / 1e9:.0f} GOP/s{stable}"
    )
    columns = ["workload", "format", "tok/s", "min–max", "limit", "fraction", "transformers"]
    report(title, columns, rows, lines)


def decode_step_s(worker: Worker, streams: int, tokens: int) -> float:
    """Mean seconds of a step in which every row decodes, everything between steps included."""
    bench = Bench(worker, BUDGET)
    for handle in range(streams):
        bench.add(handle, bench.random_prompt(handle, PROMPT), tokens + slack(streams))
    while any(bench.scheduler.rows.num_done[:streams] < PROMPT) or bench.scheduler.num_waiting:
        bench.core.step()
    started = time.perf_counter()
    for _ in range(tokens):
        bench.core.step()
    elapsed = time.perf_counter() - started
    assert bench.scheduler.num_running == streams, "a row ended while the clock ran"
    return elapsed / tokens


def slack(streams: int) -> int:
    """Tokens that the first row may decode while the others' prompts are computed, and some."""
    return 8 + streams * PROMPT // 32


def prefill_s(worker: Worker, length: int) -> float:
    """Seconds from a prompt's arrival to its first token."""
    bench = Bench(worker, BUDGET)
    bench.add(0, bench.random_prompt(0, length), 1)
    started = time.perf_counter()
    bench.run()
    return time.perf_counter() - started
