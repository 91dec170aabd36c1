"""What the scheduler costs per row and step, on ranks that answer at once.

Steady decode with rows of random lengths coming and going (U(100,1024) in and out, block 16, budget 2,048), at 256
and 1,024 running rows; and the same with 100 and 100,000 requests waiting. Measured: `schedule`, `encode` and
`update`, which is all that happens between two steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import numpy as np

from loadtest.bench._report import line, report
from serving.block_hash import root_hash
from serving.engine.request import Request
from serving.engine.scheduler import Scheduler
from serving.types import SamplingParams

BUDGET = 2048
ROOT = root_hash("bench", "", b"")
SAMPLING = SamplingParams()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench scheduler", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(argv)
    rows, lines = [], []
    for num_rows in options.rows:
        runs = [measure(num_rows, 1000, options.steps, seed) for seed in range(options.repeat)]
        p50 = statistics.median(run[0] for run in runs)
        p99 = statistics.median(run[1] for run in runs)
        rows.append([f"{num_rows} rows", f"{p50 / num_rows:.2f}", f"{p99 / num_rows:.2f}", f"{p50:.0f}"])
        lines.append(
            line(
                bench=f"scheduler {num_rows}",
                value=round(p50 / num_rows, 3),
                unit="us/row/step",
                p99=round(p99 / num_rows, 3),
                us_per_step=round(p50, 1),
                target=5.0,
                n=options.repeat,
            )
        )
    depths: dict[int, list[float]] = {depth: [] for depth in options.waiting}
    for seed in range(options.repeat):
        for depth in options.waiting:  # interleaved
            depths[depth].append(measure(256, depth, options.steps, seed)[0])
    base = statistics.median(depths[options.waiting[0]])
    for depth, values in depths.items():
        step = statistics.median(values)
        rows.append([f"256 rows, {depth:,} waiting", f"{step / 256:.2f}", "", f"{step:.0f} ({step / base:.3f} x)"])
        lines.append(
            line(
                bench=f"scheduler waiting {depth}",
                value=round(step, 1),
                unit="us/step",
                ratio=round(step / base, 3),
                target=1.05,
                n=options.repeat,
            )
        )
    report("scheduler: schedule + encode + update", ["world", "µs/row p50", "p99", "µs/step p50"], rows, lines)
    return 0


def measure(num_rows: int, depth: int, num_steps: int, seed: int) -> tuple[float, float]:
    """(median, 99th percentile) µs per step with `num_rows` running and `depth` waiting throughout."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        max_num_seqs=num_rows,
        max_num_batched_tokens=max(BUDGET, 2 * num_rows),
        max_model_len=2048,
        num_blocks=num_rows * 130,
        block_size=16,
    )
    noise = np.random.default_rng(seed)
    number = 0

    def arrive() -> None:
        nonlocal number
        prompt = noise.integers(0, 50_000, rng.randint(100, 1024)).astype(np.int32)
        number += 1
        scheduler.add(
            Request(
                key=(0, number),
                tokens=prompt,
                num_prompt=len(prompt),
                max_total=len(prompt) + rng.randint(100, 1024),
                sampling=SAMPLING,
                stop_ids=(2,),
                priority=0,
                root=ROOT,
            )
        )

    for _ in range(num_rows + depth):
        arrive()
    ids = noise.integers(3, 50_000, num_rows).astype(np.int32)
    times = []
    while len(times) < num_steps:
        started = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None
        plan.encode()
        output = scheduler.update(plan, ids[: int(np.count_nonzero(plan.num_samples))])
        elapsed = time.perf_counter() - started
        for _ in output.finished:
            arrive()
        if len(plan.slots) >= 0.95 * num_rows:
            times.append(elapsed * 1e6)
    return statistics.median(times), sorted(times)[int(0.99 * len(times))]
