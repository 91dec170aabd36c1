"""Decode throughput at 1, 8 and 32 streams, and prefill throughput, each against its physical limit.

Greedy, end of sequence ignored, prefix cache off, prompt of 128 tokens. Decode counts wall time from the first
step in which every row decodes to the last, scheduling and sampling included. The limit is bytes over bandwidth
or operations over rate, with ceilings sampled between the workloads; when they move by more than 5 % the
fractions are marked unstable. The peer is transformers' model with a static batch, best of its trials.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from loadtest.bench._ceilings import CeilingMeter
from loadtest.bench._engine import Bench, add_model_options, load_worker, shape_of
from loadtest.bench._peer import find_peer
from loadtest.bench._report import line, report
from serving.engine.worker import Worker
from serving.planning.roofline import decode_time_min, prefill_time_min

PROMPT = 128


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench decode", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="decoded per stream")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512], help="prompt lengths")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peer-repeat", type=int, default=2, help="0 leaves the peer out")
    options = parser.parse_args(argv)
    longest = max(max(options.prefill), PROMPT + options.tokens + slack(max(options.streams))) + 16
    budget = 256
    worker = load_worker(options, max_num_seqs=max(options.streams), max_model_len=longest, budget=budget)
    shape = shape_of(worker)
    footprint = int(shape.parameters * shape.weight_bytes)
    meter = CeilingMeter(footprint)

    decode: dict[int, list[float]] = {streams: [] for streams in options.streams}
    prefill: dict[int, list[float]] = {length: [] for length in options.prefill}
    for _ in range(options.repeat + 1):  # interleaved; the first is discarded
        for streams in options.streams:
            meter.sample()
            decode[streams].append(decode_step_s(worker, streams, options.tokens, budget))
        for length in options.prefill:
            meter.sample()
            prefill[length].append(prefill_s(worker, length, budget))

    theirs: dict[str, float] = {}
    peer = find_peer(Path(worker.settings.model_dir), options.dtype) if options.peer_repeat else None
    if peer is not None:
        for streams in options.streams:
            times = [peer.decode_step_s(streams, PROMPT, options.tokens // 2) for _ in range(options.peer_repeat)]
            theirs[f"decode {streams}"] = streams / min(times)
        for length in options.prefill:
            theirs[f"prefill {length}"] = length / min(peer.prefill_s(length) for _ in range(options.peer_repeat))

    ceilings, spread = meter.ceilings, meter.spread
    rows, lines = [], []
    common = {
        "shape": Path(worker.settings.model_dir).name,
        "fmt": options.dtype,
        "kernels": worker.found.kernels,
        "threads": worker.found.num_threads,
    }

    def result(name: str, times: list[float], tokens: int, limit_s: float) -> None:
        kept = times[1:]
        median = statistics.median(kept)
        value, limit = tokens / median, tokens / limit_s
        between = f"{tokens / max(kept):.1f}–{tokens / min(kept):.1f}"
        against = theirs.get(name)
        rows.append([name, f"{value:.1f}", between, f"{limit:.1f}", f"{value / limit:.0%}"])
        rows[-1].append("" if against is None else f"{against:.1f}")
        lines.append(
            line(
                bench=name,
                value=round(value, 2),
                unit="tok/s",
                limit=round(limit, 2),
                fraction=round(value / limit, 3),
                ceilings=ceilings.as_json(),
                ceiling_spread=round(spread, 3),
                peer=None
                if peer is None
                else {"engine": peer.name, "version": peer.version, "value": round(against or 0, 2)},
                n=options.repeat,
                **common,
            )
        )

    for streams, times in decode.items():
        contexts = [PROMPT + options.tokens // 2] * streams
        result(f"decode {streams}", times, streams, decode_time_min(shape, contexts, ceilings))
    for length, times in prefill.items():
        result(f"prefill {length}", times, length, prefill_time_min(shape, length, 0, ceilings))
    stable = "" if spread <= 0.05 else f"; UNSTABLE: ceilings moved by {spread:.0%} during the run"
    title = (
        f"{common['shape']} {options.dtype}, {worker.found.kernels}, {worker.found.num_threads} threads; ceilings "
        f"{ceilings.read_bytes_s / 1e9:.1f} GB/s, {ceilings.flops_s / 1e9:.0f} GFLOP/s{stable}"
    )
    report(title, ["workload", "tok/s", "min–max", "limit", "fraction", "transformers"], rows, lines)
    return 0


def decode_step_s(worker: Worker, streams: int, tokens: int, budget: int) -> float:
    """Mean seconds of a step in which every row decodes, everything between steps included."""
    bench = Bench(worker, budget)
    for handle in range(streams):
        bench.add(handle, PROMPT, tokens + slack(streams))
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


def prefill_s(worker: Worker, length: int, budget: int) -> float:
    """Seconds from a prompt's arrival to its first token."""
    bench = Bench(worker, budget)
    bench.add(0, length, 1)
    started = time.perf_counter()
    while bench.scheduler.has_work:
        bench.core.step()
    return time.perf_counter() - started
