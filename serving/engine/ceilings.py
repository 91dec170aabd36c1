"""What this device can do, measured once while a replica starts, in about a third of a second.

The benchmark of decoding samples its ceilings between its runs (`argosy bench decode`); a replica has no such
moment, so what it quotes is one reading, disturbed by whatever else the machine did then. Whoever knows better
gives the rates as settings.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from serving.planning.roofline import Ceilings

SECONDS = 0.05
"""For each of at most four kinds."""
_MIN_READ_BYTES = 8 << 20
_MAX_READ_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}  # a GPU reads the former faster than it is asked to
_QUEUED = {"cpu": 1, "cuda": 8}  # calls before it is waited for
_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}


def measure(device: torch.device, weight_bytes: int, *, is_integer: bool) -> Ceilings:
    """weight_bytes: what a step reads; a cache that holds all of it is part of the limit.

    is_integer: linears multiply int8 codes. Attention is in floating point.
    Raises RuntimeError when there is no room for the buffers, or when torch does not know the arithmetic here.
    """
    read_bytes = min(max(weight_bytes, _MIN_READ_BYTES), _MAX_READ_BYTES[device.type])
    return _measure(device, read_bytes, is_integer, torch.get_num_threads())


@functools.lru_cache(maxsize=8)
def _measure(device: torch.device, read_bytes: int, is_integer: bool, num_threads: int) -> Ceilings:
    values = _filled(read_bytes // 4, device=device, dtype=torch.float32)
    read = _rate(read_bytes, values.sum, device)
    floating = max(_matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    linear = max(_matmul_rate(device, torch.int8), floating) if is_integer else floating
    return Ceilings(read, linear, floating)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square matrices, as large as the time allows."""
    best = 0.0
    for size in _SIZES[device.type]:
        work = 2.0 * size**3
        if best and work / best > SECONDS:
            break
        if dtype is torch.int8:
            codes = torch.ones(size, size, dtype=dtype, device=device)
            best = max(best, _rate(work, lambda codes=codes: torch._int_mm(codes, codes.T), device))  # type: ignore[misc]
        else:
            matrix = _filled(size, size, dtype=dtype, device=device)
            best = max(best, _rate(work, lambda matrix=matrix: matrix @ matrix, device))  # type: ignore[misc]
    return best


def _filled(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a GPU random values: ones let it run faster than any model does (seen: 13 %)."""
    values = torch.ones(shape, dtype=dtype, device=device)
    return values if device.type == "cpu" else values.normal_()


def _rate(work: float, function: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The best within SECONDS / 2, the first call apart. Reading a value waits for the device, and takes a while."""
    repeat = _QUEUED[device.type]
    function().view(-1)[0].item()
    best = float("inf")
    until = time.perf_counter() + SECONDS / 2
    while True:
        started = time.perf_counter()
        for _ in range(repeat - 1):
            function()
        function().view(-1)[0].item()
        now = time.perf_counter()
        best = min(best, (now - started) / repeat)
        if now >= until:
            return work / best
