"""Ceilings of a GPU and how to time work on it. Random values: a product of ones runs faster than one of data."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from serving.planning.roofline import Ceilings

COPY_BYTES = 4 << 30
MATRIX = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class GpuCeilings:
    """Of one device, measured once."""

    copy_bytes_s: float  # bytes read and bytes written, of a copy of 4 GiB
    read_bytes_s: float  # a sum over 4 GiB
    flops_s: float  # 8192³ in bf16

    @property
    def ceilings(self) -> Ceilings:
        """The higher of both bandwidths: a copy mixes reads and writes."""
        return Ceilings(max(self.copy_bytes_s, self.read_bytes_s), self.flops_s)

    def as_json(self) -> dict[str, float]:
        return {
            "copy_gb_s": round(self.copy_bytes_s / 1e9, 1),
            "read_gb_s": round(self.read_bytes_s / 1e9, 1),
            "bf16_tflop_s": round(self.flops_s / 1e12, 1),
        }


def has_gpu() -> bool:
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "cuda"  # type: ignore[union-attr]


def measure_ceilings() -> GpuCeilings:
    copy_s, read_s = _bandwidth_s()
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").bfloat16() for _ in range(2))
    flops_s = 2.0 * MATRIX**3 / seconds(lambda: a @ b, repeat=20)
    return GpuCeilings(2 * COPY_BYTES / copy_s, COPY_BYTES / read_s, flops_s)


def _bandwidth_s() -> tuple[float, float]:
    """Seconds of a copy and of a read of COPY_BYTES; the buffers are free again afterwards."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    read_s = min(seconds(lambda: torch.sum(source), repeat=10), seconds(lambda: torch.amax(source), repeat=10))
    return seconds(lambda: target.copy_(source), repeat=10), read_s


def seconds(work: Callable[[], object], *, repeat: int, rounds: int = 5) -> float:
    """Of one call among `repeat` queued ones: the median of `rounds`, the first calls apart."""
    for _ in range(3):
        work()
    torch.accelerator.synchronize()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repeat):
            work()
        torch.accelerator.synchronize()
        taken.append((time.perf_counter() - started) / repeat)
    return statistics.median(taken)
