"""Frozen settings; the only reader of os.environ, YAML files and flags (C16)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What was asked of one replica. None = found out at start (see `found`)."""

    model_dir: str  # a model folder in the runtime format (C12)
    served_model_name: str
    dtype: str = "bfloat16"  # bfloat16 | float32
    device: str = "cpu"
    max_model_len: int | None = None  # None = the model's
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 256  # the fixed token budget of a step (C7)
    kv_cache_bytes: int | None = None
    block_size: int = 16
    seed: int = 0
    num_threads: int | None = None  # None = the cores this process may use
    async_depth: int = 0  # steps in flight beyond the one being read (C5)
    enable_prefix_cache: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What was asked of one gateway process."""

    fd: int  # a listening socket bound by the supervisor (C24)
    replicas: tuple[str, ...] = ()  # static membership: "unix:<path>" or "tcp:<host>:<port>"
    directory_url: str | None = None  # or long-polled membership (C20)
    secret: str = ""  # hex; shared with the replicas (C22)
    name: str = "gateway-0"
    served_model_name: str = ""  # known before the first card, so that an early request waits
    max_queue_len: int = 2000  # choices
    queue_timeout_s: float = 30.0  # how long a request may wait for capacity
    request_timeout_s: float = 600.0
    max_body_bytes: int = 2 << 20
    cache_dir: str = ""  # assets fetched from replicas, by hash (C23)
