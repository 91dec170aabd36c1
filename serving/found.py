"""What was found at start (C16): facts of this machine and installation; nobody can ask for them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from serving.config import OPTIONS, EngineSettings, GatewaySettings, ServeSettings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Learnt once, when the settings are complete and before anything slow starts."""

    argosy: str
    python: str
    torch: str
    ray: str
    cores: int  # this process may use
    memory_available_bytes: int  # the smaller of the machine's and the control group's
    has_cuda: bool  # a device is present and the installed torch was built for it
    num_threads: int  # of each replica
    store: str


def find(settings: ServeSettings) -> Found:
    """Facts of this machine. Imports neither torch nor ray, so that refusals stay fast."""
    cores = len(os.sched_getaffinity(0))
    torch = _installed("torch")
    return Found(
        argosy=_installed("argosy"),
        python=platform.python_version(),
        torch=torch,
        ray=_installed("ray"),
        cores=cores,
        memory_available_bytes=_memory_available_bytes(),
        has_cuda=Path("/dev/nvidiactl").exists() and not torch.endswith("+cpu"),
        num_threads=settings.engine.num_threads or max(1, cores // settings.replicas),
        store=settings.store,
    )


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory_available_bytes() -> int:
    """MemAvailable, or what the control group (v2) still allows when that is less."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(match.group(1)) << 10 if match else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or version 1: the machine's figure stands
    return max(available, 0)


def shown(settings: ServeSettings, facts: Found) -> dict[str, dict[str, Any]]:
    """Both records as `--print-config` prints them; `asked` is a valid --config file."""
    parts: dict[type, Any] = {
        ServeSettings: settings,
        EngineSettings: settings.engine,
        GatewaySettings: settings.gateway,
    }
    asked = {key: getattr(parts[option.section], key) for key, option in OPTIONS.items()}
    return {"asked": asked, "found": dataclasses.asdict(facts)}
