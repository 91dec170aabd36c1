"""What this machine can do, measured in the run that quotes it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from loadtest.bench._roofline import Ceilings

_COPIES = 4


def measure(footprint_bytes: int, *, seconds: float = 1.0) -> Ceilings:
    """Best rates over repeated trials: a ceiling is what was reached, not an average.

    read: all threads sum a buffer of `footprint_bytes`, rotating over copies so that no cache holds it.
    flops: the fastest of fp32 and bf16 matmul at 2048³ through torch. On processors with bf16 dot products that is
        bf16; whatever arithmetic our kernels use, they are held against it.
    """
    buffers = [torch.ones(footprint_bytes // 4) for _ in range(_COPIES)]
    read = _best(seconds, buffers[0].nbytes, *[lambda b=buffer: b.sum() for buffer in buffers])
    flops = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048).to(dtype)
        flops = max(flops, _best(seconds, 2 * 2048**3, lambda a=a: a @ a))
    return Ceilings(read, flops)


def drift(before: Ceilings, after: Ceilings) -> float:
    """Largest relative change of a ceiling during the run."""
    return max(abs(after.read_bytes_s / before.read_bytes_s - 1), abs(after.flops_s / before.flops_s - 1))


def _best(seconds: float, work: float, *functions: Callable[[], object]) -> float:
    best = float("inf")
    until = time.perf_counter() + seconds
    for function in functions:
        function()
    while time.perf_counter() < until:
        for function in functions:
            started = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - started)
    return work / best
