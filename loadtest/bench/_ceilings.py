"""What this machine can do, measured between the runs that quote it: neighbours and clocks move."""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from serving.planning.roofline import Ceilings

_COPIES = 4
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


class _Sample(NamedTuple):
    read_bytes_s: float
    flops_s: float
    int8_ops_s: float


class CeilingMeter:
    """Samples the ceilings beside the workload; the ceiling of a run is the median of its samples.

    read: all threads sum buffers of `footprint_bytes`, rotating over copies so that no cache holds them, on
        huge pages where the system grants them (address translation is no physical limit).
    flops: the fastest of fp32 and bf16 matmul at 2048³ through torch. On processors with bf16 dot products
        that is bf16; whatever arithmetic our kernels use, they are held against it.
    int8_ops: products and sums of int8 matmul at 2048³ through torch (`torch._int_mm`).
    """

    def __init__(self, footprint_bytes: int) -> None:
        self._buffers = [_huge_ones(footprint_bytes) for _ in range(_COPIES)]
        self._matrices = [torch.randn(2048, 2048).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
        self._codes = torch.randint(-127, 128, (2048, 2048), dtype=torch.int8)
        self._samples: list[_Sample] = []

    def sample(self, seconds: float = 0.5) -> None:
        """One sample: the best rate within a fraction of a second."""
        size, work, codes = self._buffers[0].nbytes, 2 * 2048**3, self._codes
        self._samples.append(
            _Sample(
                max(_rate(seconds / 4, size, [b.sum for b in self._buffers]), 1.0),
                max(_rate(seconds / 4, work, [lambda a=a: a @ a]) for a in self._matrices),
                _rate(seconds / 4, work, [lambda: torch._int_mm(codes, codes.T)]),
            )
        )

    def ceilings(self, is_integer: bool = False) -> Ceilings:
        """For linears in floating point or in int8; attention is in floating point."""
        found = [statistics.median(values) for values in self._by_kind()]
        return Ceilings(found[0], found[2] if is_integer else found[1], found[1])

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the samples, relative to the median: the largest of all rates."""
        return max(_relative_spread(values) for values in self._by_kind())

    def _by_kind(self) -> list[list[float]]:
        return [list(values) for values in zip(*self._samples, strict=True)]


def _relative_spread(values: list[float]) -> float:
    if len(values) < 4:
        return (max(values) - min(values)) / 2 / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def _huge_ones(num_bytes: int) -> torch.Tensor:
    area = mmap.mmap(-1, num_bytes + _HUGE_PAGE)
    raw = torch.frombuffer(area, dtype=torch.uint8)
    skip = -raw.data_ptr() % _HUGE_PAGE
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(raw.data_ptr() + skip), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)
    return raw[skip : skip + num_bytes // 4 * 4].view(torch.float32).fill_(1.0)


def _rate(seconds: float, work: float, functions: list[Callable[[], object]]) -> float:
    best = float("inf")
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for function in functions:
            started = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - started)
    return work / best
