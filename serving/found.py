"""What was found at start (C16): facts of this machine and installation; nobody can ask for them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import json
import os
import platform
import re
from pathlib import Path
from typing import Any, Final

from serving.config import OPTIONS, EngineSettings, GatewaySettings, ServeSettings
from serving.errors import SettingsError


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
    num_threads: int  # of each rank
    store: str


def find(settings: ServeSettings) -> Found:
    """Facts of this machine. Imports neither torch nor ray, so that refusals stay fast."""
    cores = len(os.sched_getaffinity(0))
    torch = _installed("torch")
    num_ranks = settings.engine.tensor_parallel_size * settings.engine.pipeline_parallel_size
    return Found(
        argosy=_installed("argosy"),
        python=platform.python_version(),
        torch=torch,
        ray=_installed("ray"),
        cores=cores,
        memory_available_bytes=_memory_available_bytes(),
        has_cuda=Path("/dev/nvidiactl").exists() and not torch.endswith("+cpu"),
        num_threads=settings.engine.num_threads or max(1, cores // (settings.replicas * num_ranks)),
        store=settings.store,
    )


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_TRACING: Final = "opentelemetry-exporter-otlp-proto-http"


def check_tracing(settings: ServeSettings) -> None:
    """Refuse to trace without what tracing needs. Raises SettingsError that says what to install."""
    if settings.gateway.trace_endpoint and _installed(_TRACING) == "not installed":
        raise SettingsError(
            f"--trace-endpoint: tracing needs {_TRACING}, which is not installed; pip install 'argosy[tracing]'"
        )


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


# --- does the model fit? ------------------------------------------------------------------------

_PROCESS_BYTES: Final = 400 << 20  # a rank's interpreter, torch and activations (measured: 300 MiB)
_BYTES_PER_WEIGHT: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_BYTES_PER_CODE: Final = {"int8": 1.0, "int4": 0.5625}  # of a linear weight with its scales; nearly all weights are


def check_model(model_dir: Path, settings: ServeSettings, facts: Found) -> None:
    """Refuse a model that this build or this machine cannot serve, before a replica tries.

    Raises SettingsError with the numbers and what to change.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    known = supported_architectures()
    if model_type not in known:
        raise SettingsError(
            f"{settings.model}: the architecture {model_type!r} is not supported; this build serves {', '.join(known)}"
        )
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    file_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    engine = settings.engine
    bytes_per_weight = _BYTES_PER_CODE.get(engine.quantization, _BYTES_PER_WEIGHT[engine.dtype])
    weight_bytes = int(file_bytes * bytes_per_weight // _BYTES_PER_WEIGHT.get(stored, 2))
    num_ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    cache_bytes = num_ranks * (engine.kv_cache_bytes or 0)
    needed = settings.replicas * (weight_bytes + cache_bytes + num_ranks * _PROCESS_BYTES)
    if needed > facts.memory_available_bytes:
        cache = f" + {_size(cache_bytes)} KV cache" if cache_bytes else ""
        processes = f"{_size(num_ranks * _PROCESS_BYTES)} {'processes' if num_ranks > 1 else 'process'}"
        times = f" x {settings.replicas} replicas" if settings.replicas > 1 else ""
        raise SettingsError(
            f"{settings.model} needs {_size(needed)} of memory ({_size(weight_bytes)} weights{cache} + {processes}"
            f"{times}) but {_size(facts.memory_available_bytes)} are free; "
            f"serve a smaller model, or lower {'the number of ranks, ' if num_ranks > 1 else ''}--replicas or "
            "--kv-cache-bytes"
        )


def supported_architectures() -> list[str]:
    """The model types we can serve: the names of the files in models/architectures."""
    folder = importlib.resources.files("models.architectures")
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".py") for name in names if name.endswith(".py") and not name.startswith("_"))


def _size(count: int) -> str:
    if count >= 1 << 30:
        return f"{count / (1 << 30):.1f} GiB"
    return f"{count / (1 << 20):.0f} MiB"
