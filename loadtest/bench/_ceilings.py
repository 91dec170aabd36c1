"""What this machine can do, measured between the runs that quote it: neighbours and clocks move."""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable

import torch

from serving.planning.roofline import Ceilings

_COPIES = 4
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


class CeilingMeter:
    """Samples the ceilings beside the workload; the ceiling of a run is the median of its samples.

    read: all threads sum buffers of `footprint_bytes`, rotating over copies so that no cache holds them, on
        huge pages where the system grants them (address translation is no physical limit).
    flops: the fastest of fp32 and bf16 matmul at 2048³ through torch. On processors with bf16 dot products
        that is bf16; whatever arithmetic our kernels use, they are held against it.
    """

    def __init__(self, footprint_bytes: int) -> None:
        self._buffers = [_huge_ones(footprint_bytes) for _ in range(_COPIES)]
        self._matrices = [torch.randn(2048, 2048).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
        self._samples: list[Ceilings] = []

    def sample(self, seconds: float = 0.5) -> None:
        """One sample: the best rate within a fraction of a second."""
        size = self._buffers[0].nbytes
        read = max(_rate(seconds / 3, size, [b.sum for b in self._buffers]), 1.0)
        flops = max(_rate(seconds / 3, 2 * 2048**3, [lambda a=a: a @ a]) for a in self._matrices)
        self._samples.append(Ceilings(read, flops))

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings(
            statistics.median(sample.read_bytes_s for sample in self._samples),
            statistics.median(sample.flops_s for sample in self._samples),
        )

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the samples, relative to the median: the larger of both rates."""
        return max(
            _relative_spread([sample.read_bytes_s for sample in self._samples]),
            _relative_spread([sample.flops_s for sample in self._samples]),
        )


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
