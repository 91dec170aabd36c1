"""What a gateway counts of one model."""

from __future__ import annotations

import dataclasses
from collections import Counter

from serving.metrics.histogram import Histogram


@dataclasses.dataclass(slots=True)
class ModelSeries:
    """Numbers of one served model."""

    time_to_first_token: Histogram = dataclasses.field(default_factory=Histogram)
    inter_token_latency: Histogram = dataclasses.field(default_factory=Histogram)
    request_latency: Histogram = dataclasses.field(default_factory=Histogram)
    queue_time: Histogram = dataclasses.field(default_factory=Histogram)
    prefill_time: Histogram = dataclasses.field(default_factory=Histogram)
    decode_time: Histogram = dataclasses.field(default_factory=Histogram)
    num_waiting: int = 0  # requests submitted, no token yet
    num_running: int = 0  # requests with a token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_resumes: int = 0
    num_disconnects: int = 0
    finished: Counter[str] = dataclasses.field(default_factory=Counter)  # choices by finish reason
    broken: Counter[str] = dataclasses.field(default_factory=Counter)  # streams by error code
