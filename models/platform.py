"""Facts about the device that serves: what it is called, what it can hold, what it can execute."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from models.config import ModelError


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceFacts:
    kind: str  # "cpu" | "cuda"
    name: str  # of the product, for people
    isa: str  # the widest instruction set that kernels may choose by; part of the fingerprint (C4)
    memory_bytes: int  # that this process may use in all
    free_memory_bytes: int
    num_cores: int  # CPU cores that this process may run on


def device_facts(device: torch.device | str) -> DeviceFacts:
    """Look the device up. Raises ModelError when there is no such device here."""
    device = torch.device(device)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        total, free = _host_memory()
        return DeviceFacts("cpu", _cpu_name(), _cpu_isa(), total, free, num_cores)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ModelError(f"device {str(device)!r} does not exist: {count} CUDA devices are visible")
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        return DeviceFacts("cuda", facts.name, f"sm_{facts.major}{facts.minor}", total, free, num_cores)
    raise ModelError(f"device must be cpu or cuda; got {str(device)!r}")


def host_buffer(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 on the host, of memory that `device` copies from and to while the host goes on."""
    return torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")


def mark(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done what it has been given so far. On a CPU that is done already."""
    if device.type == "cpu":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


# In rising order; the last one present names the level. Flags as /proc/cpuinfo spells them.
_ISA_LEVELS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")


def _cpu_isa() -> str:
    flags = _cpuinfo("flags", "Features").split()
    return next((level for level in reversed(_ISA_LEVELS) if level in flags), platform.machine() or "unknown")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def _cpuinfo(*keys: str) -> str:
    """The value of the first line that starts with one of `keys`, or "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return ""


def _host_memory() -> tuple[int, int]:
    """(total, free) bytes: the machine's, or the container's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo_available() or total
    limit, used = _number(Path("/sys/fs/cgroup/memory.max")), _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, max(limit - (used or 0), 0))
    return total, free


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else int(kib) * 1024


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
