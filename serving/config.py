"""Frozen settings; the only reader of os.environ, YAML files and flags (C16).

What was *asked* (`ServeSettings`) is kept apart from what was found at start (serving/found.py). A setting
has one name everywhere: `max_num_seqs` in a YAML file, `ARGOSY_MAX_NUM_SEQS` in the environment and
`--max-num-seqs` on the command line. Flags win over the environment, the environment over the file,
the file over the defaults below.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from serving.errors import SettingsError
from serving.parsing import parse_bool, parser

ENVIRONMENT_PREFIX: Final = "ARGOSY_"
DEFAULT_MODEL: Final = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What was asked of one replica. None = found out at start (see `found`)."""

    model_dir: str  # a model folder in the runtime format (C12)
    served_model_name: str
    dtype: str = "bfloat16"  # bfloat16 | float16 | float32
    quantization: str = "auto"  # of the linears: auto (as the model folder has them) | none | int8 | int4
    device: str = "cpu"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    collectives: str = "auto"  # auto | shared-memory | gloo | nccl: what moves tensors among the ranks
    max_model_len: int | None = None  # None = the model's
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 256  # the fixed token budget of a step (C7)
    kv_cache_bytes: int | None = None  # of each rank
    block_size: int = 16
    seed: int = 0
    num_threads: int | None = None  # None = the cores this process may use
    async_depth: int | None = None  # steps in flight beyond the one being read (C5); None = 1 on cuda, 0 on cpu
    weight_cache_dir: str = ""  # where packed weights are kept for the next start; "" = nowhere
    enable_prefix_cache: bool = True
    read_limit_gb_s: float | None = None  # memory reads of a rank's device; None = measured at start, one rank only
    compute_limit_tflops: float | None = None  # arithmetic of its linears; likewise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What was asked of one gateway process."""

    fd: int  # a listening socket bound by the supervisor (C24)
    replicas: tuple[str, ...] = ()  # static membership: "unix:<path>" or "tcp:<host>:<port>"
    directory_url: str | None = None  # or long-polled membership (C20)
    secret: str = ""  # hex; shared with the replicas (C22); several between commas while they rotate
    name: str = "gateway-0"
    served_model_name: str = ""  # known before the first card, so that an early request waits
    max_queue_len: int = 2000  # choices
    queue_timeout_s: float = 30.0  # how long a request may wait for capacity
    request_timeout_s: float = 600.0
    max_body_bytes: int = 2 << 20
    operator_token_file: str = ""  # whoever shows its content may see what operators see; read again when it changes
    cache_dir: str = ""  # assets fetched from replicas, by hash (C23)
    can_wake: bool = False  # replicas may be none while nobody asks, and the first request starts one
    drain_s: float = 2.0  # how long running requests may still take once the process is told to end
    log_format: str = "text"  # that of the service
    slow_request_s: float = 60.0  # in text, a request is logged when it failed or took longer
    trace_endpoint: str = ""  # where spans go: an OTLP/HTTP collector's URL; "" = nowhere
    trace_sample: float = 1.0  # share of requests traced; what a caller's traceparent says wins


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Everything that was asked of `argosy serve`."""

    model: str = DEFAULT_MODEL  # alias, folder, GGUF file or hub id
    served_model_name: str = ""  # "" = derived from `model`
    host: str = "127.0.0.1"
    port: int = 8000  # 0 = any free port
    runtime: str = "ray"  # ray | local
    replicas: int = 1  # how many there are; the most, where min_replicas or max_replicas is given
    min_replicas: int | None = None  # autoscaling: never fewer; 0 = none while nobody asks
    max_replicas: int | None = None  # … never more
    max_queue_delay_s: float = 2.0  # … a predicted wait above it adds replicas
    scale_in_window_s: float = 300.0  # … fewer must have been enough for so long before one goes
    scale_to_zero_after_s: float = 600.0  # … without any work
    gateways: int = 1
    drain_timeout_s: float = 30.0  # how long a replica that leaves waits for its rows to move (C19)
    log_format: str = "text"  # text, for people | json, one object a line
    store: str = ""  # where `argosy pull` keeps models; "" = the user's cache folder
    weight_cache: str = ""  # folder of packed weights for the next start | off; "" = in the store, if rounded at load
    engine: EngineSettings = dataclasses.field(
        default_factory=lambda: EngineSettings(model_dir="", served_model_name="")
    )
    gateway: GatewaySettings = dataclasses.field(default_factory=lambda: GatewaySettings(fd=-1))

    @property
    def is_autoscaled(self) -> bool:
        return self.min_replicas is not None


# --- the one table of settings ----------------------------------------------------------------

_INTERNAL: Final = {
    EngineSettings: {"model_dir", "served_model_name", "weight_cache_dir"},
    GatewaySettings: {
        "fd",
        "replicas",
        "directory_url",
        "secret",
        "name",
        "served_model_name",
        "cache_dir",
        "can_wake",
        "drain_s",
        "log_format",
    },
    ServeSettings: {"engine", "gateway"},
}
"""Fields that the supervisor fills in; nobody asks for them."""

_CHOICES: Final = {
    "runtime": ("ray", "local"),
    "dtype": ("bfloat16", "float16", "float32"),
    "quantization": ("auto", "none", "int8", "int4"),
    "collectives": ("auto", "shared-memory", "gloo", "nccl"),
    "device": ("cpu", "cuda"),
    "log_format": ("text", "json"),
}

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "port": (0, 65535),
    "replicas": (1, 64),
    "min_replicas": (0, 64),
    "max_replicas": (1, 64),
    "max_queue_delay_s": (0.05, 3600),
    "scale_in_window_s": (1, 86400),
    "scale_to_zero_after_s": (1, 604800),
    "gateways": (1, 64),
    "tensor_parallel_size": (1, 64),
    "pipeline_parallel_size": (1, 64),
    "drain_timeout_s": (0, 3600),
    "max_model_len": (1, 1 << 24),
    "max_num_seqs": (1, 4096),
    "max_num_batched_tokens": (1, 1 << 20),
    "kv_cache_bytes": (1 << 20, 1 << 44),
    "block_size": (16, 16),
    "seed": (0, (1 << 63) - 1),
    "num_threads": (1, 1024),
    "async_depth": (0, 1),
    "read_limit_gb_s": (0.001, 1e6),
    "compute_limit_tflops": (0.001, 1e6),
    "max_queue_len": (1, 1_000_000),
    "queue_timeout_s": (0, 3600),
    "request_timeout_s": (1, 86400),
    "max_body_bytes": (1 << 10, 1 << 30),
    "slow_request_s": (0, 86400),
    "trace_sample": (0, 1),
}

_CUDA_BATCHED_TOKENS: Final = 2048
"""A prompt of 256 tokens leaves a GPU's arithmetic units waiting for weights."""

_LATER: Final = {
    "gateways": "several gateway processes",
}
"""Settings that exist, whose values above 1 are refused until their feature does."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    section: type
    parse: Callable[[str], Any]
    is_optional: bool


OPTIONS: Final[dict[str, _Option]] = {
    field.name: _Option(section, parser(field.name, str(field.type)), "None" in str(field.type))
    for section in (ServeSettings, EngineSettings, GatewaySettings)
    for field in dataclasses.fields(section)
    if field.name not in _INTERNAL[section]
}
"""Every setting by its one name."""


def _value(key: str, given: object, origin: str) -> Any:
    """`given` as the option's type and within its bounds. Raises SettingsError naming `origin`."""
    option = OPTIONS[key]
    if given is None:
        if option.is_optional:
            return None
        raise SettingsError(f"{origin}: a value is missing")
    if not isinstance(given, str | int | float | bool):
        raise SettingsError(f"{origin}: expected one value, not a {type(given).__name__}")
    if isinstance(given, bool) and option.parse is not parse_bool:
        raise SettingsError(f"{origin}: expected a value, not {str(given).lower()}")
    try:
        value = option.parse(str(given))
    except ValueError as error:
        raise SettingsError(f"{origin}: {error}, not {str(given)!r}") from None
    choices = _CHOICES.get(key)
    if choices is not None and value not in choices:
        raise SettingsError(f"{origin}: {value!r} is not one of {', '.join(choices)}")
    low, high = _RANGES.get(key, (None, None))
    if low is not None and high is not None and not low <= value <= high:
        raise SettingsError(f"{origin}: {value:,} is outside {low:,} to {high:,}")
    if key in _LATER and value > 1:
        raise SettingsError(f"{origin}: {_LATER[key]} ({value}) comes with a later release; only 1 works today")
    if key == "trace_endpoint" and value and not re.match(r"https?://[^/\s]+", value):
        raise SettingsError(f"{origin}: {value!r} is no http:// or https:// URL")
    if key == "model" and not value:
        raise SettingsError(f"{origin}: name a model, for example {DEFAULT_MODEL}")
    return value


def _refuse_unknown(key: str, origin: str, spell: Callable[[str], str]) -> None:
    if key in OPTIONS:
        return
    near = difflib.get_close_matches(key, OPTIONS, n=1)
    hint = f"; did you mean {spell(near[0])}?" if near else ""
    raise SettingsError(f"{origin}: unknown setting{hint}")


def _read_yaml(path: Path) -> dict[str, object]:
    """The file's mapping; keys may be spelled with dashes. Raises SettingsError."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not YAML: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"--config {path}: expected `name: value` lines, not a {type(document).__name__}")
    return {str(key).replace("-", "_"): value for key, value in document.items()}


_SERVICE_LINK: Final = re.compile(r"(.+_)?(SERVICE_(HOST|PORT)(_.+)?|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)")
"""Variables that Kubernetes adds to every pod for a Service named argosy or argosy-…"""


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        rest = name.removeprefix(ENVIRONMENT_PREFIX)
        is_setting = rest.lower() in OPTIONS and not value.startswith("tcp://")
        if is_setting or (rest != "CONFIG" and not _SERVICE_LINK.fullmatch(rest)):
            found[rest.lower()] = value
    return found


def load(
    flags: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServeSettings:
    """Settings from flags > environment > YAML > defaults.

    flags: by setting name; None = the flag was not given. config: the YAML file (`--config`, else
    ARGOSY_CONFIG). environ: os.environ unless a test gives another.
    Raises SettingsError naming the flag, variable or file, the limit and the given value.
    """
    environ = os.environ if environ is None else environ
    if config is None and environ.get(ENVIRONMENT_PREFIX + "CONFIG"):
        config = Path(environ[ENVIRONMENT_PREFIX + "CONFIG"])
    values: dict[str, Any] = {}
    if config is not None:
        for key, given in _read_yaml(config).items():
            origin = f"{config}: {key}"
            _refuse_unknown(key, origin, str)
            values[key] = _value(key, given, origin)
    for key, text in _read_environment(environ).items():
        origin = f"{ENVIRONMENT_PREFIX}{key.upper()}"
        _refuse_unknown(key, origin, lambda near: ENVIRONMENT_PREFIX + near.upper())
        values[key] = _value(key, text, origin)
    for key, given in (flags or {}).items():
        if given is not None:
            origin = "--" + key.replace("_", "-")
            _refuse_unknown(key, origin, lambda near: "--" + near.replace("_", "-"))
            values[key] = _value(key, given, origin)
    return _assemble(values, environ)


def _assemble(values: dict[str, Any], environ: Mapping[str, str]) -> ServeSettings:
    def part(section: type) -> dict[str, Any]:
        return {key: value for key, value in values.items() if OPTIONS[key].section is section}

    serve = part(ServeSettings)
    if not serve.get("store"):
        cache = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".cache")
        serve["store"] = str(Path(cache) / "argosy" / "models")
    serve["store"] = str(expanded(serve["store"]))
    model = str(serve.get("model", DEFAULT_MODEL))
    name = serve.get("served_model_name") or derived_name(model)
    serve["served_model_name"] = name
    _fit_scaling(serve)
    engine = part(EngineSettings)
    _fit_budget(engine)
    _fit_collectives(engine)
    return ServeSettings(
        **serve,
        engine=EngineSettings(model_dir="", served_model_name=name, **engine),
        gateway=GatewaySettings(fd=-1, served_model_name=name, **part(GatewaySettings)),
    )


def _default(section: type, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(section) if field.name == name)


def _fit_scaling(serve: dict[str, Any]) -> None:
    """Both bounds, or neither; `replicas` is then the most that must find room."""
    low, high = serve.get("min_replicas"), serve.get("max_replicas")
    if low is None and high is None:
        return
    if serve.get("runtime") == "local":
        flag = "--max-replicas" if low is None else "--min-replicas"
        raise SettingsError(f"{flag}: --runtime local does not autoscale; leave it out or take --runtime ray")
    if high is not None and serve.get("replicas", high) != high:
        raise SettingsError(
            f"--replicas: {serve['replicas']} is not --max-replicas {high}; leave it out, autoscaling decides"
        )
    low = 1 if low is None else low
    high = max(serve.get("replicas", 1), low) if high is None else high
    if low > high:
        raise SettingsError(f"--min-replicas: {low} is above --max-replicas {high}")
    serve.update(replicas=high, min_replicas=low, max_replicas=high)


def _fit_budget(engine: dict[str, Any]) -> None:
    """Every running row gets a token in every step: the budget holds one for each."""
    rows = engine.get("max_num_seqs", _default(EngineSettings, "max_num_seqs"))
    asked = engine.get("max_num_batched_tokens")
    if asked is not None and asked < rows:
        raise SettingsError(
            f"--max-num-batched-tokens: {asked} is less than --max-num-seqs {rows}, and every row gets a token in "
            "every step; raise the one or lower the other"
        )
    if asked is None:
        usual = (
            _CUDA_BATCHED_TOKENS
            if engine.get("device") == "cuda"
            else _default(EngineSettings, "max_num_batched_tokens")
        )
        engine["max_num_batched_tokens"] = max(rows, usual)


def _fit_collectives(engine: dict[str, Any]) -> None:
    """What moves tensors must reach them."""
    device = engine.get("device", _default(EngineSettings, "device"))
    reached = {"shared-memory": "cpu", "gloo": "cpu", "nccl": "cuda"}.get(engine.get("collectives", "auto"), device)
    if reached != device:
        raise SettingsError(
            f"--collectives: {engine['collectives']} moves tensors of --device {reached}, not {device}; "
            "leave it at auto"
        )


def expanded(path: str) -> Path:
    """With the home folder in place of ~; the ~ of a user that does not exist stays."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def derived_name(model: str) -> str:
    """The served name of a model reference: a path's last part without .gguf, anything else as it is."""
    try:
        is_path = model.startswith((".", "/", "~")) or model.endswith(".gguf") or Path(model).exists()
        name = expanded(model).resolve().name if is_path else model
    except (OSError, ValueError):  # longer than any name, or with a null character
        return model
    return name.removesuffix(".gguf") or model


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that we start: ours and `extra`."""
    return {**os.environ, **extra}


def set_environment(values: Mapping[str, str]) -> None:
    """Settings of a library that reads only the environment (Ray), before it is imported."""
    os.environ.update(values)
