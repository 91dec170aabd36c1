"""Devices and their ceilings, each figure with where it comes from.

Published figures are the vendor's data sheets for the SXM form (L4, L40S: PCIe): peaks of dense arithmetic, memory in
decimal gigabytes, links as one direction of what is published for both. Measured ones are this project's own: copies
and 8192³ matmuls on GPUs, reads and 2048³ matmuls on the CPU. A limit quoted against a measured ceiling can be
reached; against a published one it cannot quite.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Source = Literal["measured", "published", "given", "found"]


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it comes from. found: on this machine, now; given: by whoever asks."""

    value: float
    source: Source = "published"


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. None = it has no such arithmetic or link, or nobody knows."""

    name: str
    memory_bytes: Figure | None
    bandwidth: Figure  # bytes/s
    bf16: Figure | None  # operations/s of linears in bfloat16 and float16
    fp32: Figure | None
    int8: Figure | None
    fp8: Figure | None
    link: Figure | None  # bytes/s in one direction to the other devices of its node

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


def _gpu(
    name: str,
    memory_gb: float,
    bandwidth_gb_s: float,
    bf16: float,
    fp32: float,
    int8: float,
    fp8: float | None,
    link_gb_s: float,
) -> Accelerator:
    """Published figures; rates in TFLOP/s."""
    return Accelerator(
        name,
        Figure(memory_gb * 1e9),
        Figure(bandwidth_gb_s * 1e9),
        Figure(bf16 * 1e12),
        Figure(fp32 * 1e12),
        Figure(int8 * 1e12),
        None if fp8 is None else Figure(fp8 * 1e12),
        Figure(link_gb_s * 1e9),
    )


def _measured(accelerator: Accelerator, bandwidth_gb_s: float, bf16: float) -> Accelerator:
    return dataclasses.replace(
        accelerator,
        bandwidth=Figure(bandwidth_gb_s * 1e9, "measured"),
        bf16=Figure(bf16 * 1e12, "measured"),
    )


_H100 = _gpu("h100-80gb", 80, 3350, 989, 67, 1979, 1979, 450)
_H200 = _gpu("h200-141gb", 141, 4800, 989, 67, 1979, 1979, 450)

_ALL = (
    _gpu("a100-40gb", 40, 1555, 312, 19.5, 624, None, 300),
    _gpu("a100-80gb", 80, 2039, 312, 19.5, 624, None, 300),
    _gpu("l4", 24, 300, 121, 30.3, 242, 242, 32),
    _gpu("l40s", 48, 864, 362, 91.6, 733, 733, 32),
    _measured(_H100, 3000, 798),
    _measured(_H200, 4300, 769),
    _gpu("b200", 180, 8000, 2250, 80, 4500, 4500, 900),
    Accelerator(
        "cpu",
        None,  # found on the machine that asks
        Figure(34.5e9, "measured"),
        Figure(429e9, "measured"),
        Figure(315e9, "measured"),
        Figure(1209e9, "measured"),
        None,
        None,
    ),
)

ACCELERATORS = {accelerator.name: accelerator for accelerator in _ALL}
"""By the name that `--gpu` takes. cpu: two cores with AVX512-BF16 and VNNI, the project's development machine."""
