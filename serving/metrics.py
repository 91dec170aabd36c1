"""What a gateway counts, and how /metrics shows it.

The token path adds to plain numbers, once per engine frame and choice; prometheus_client formats
them when it is asked. Label values come from closed sets: served models, routes, status codes,
error codes and finish reasons. Series that dashboards built for vLLM read carry its names as well.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
MAX_MODELS = 64


class Histogram:
    """Counts per bucket. Measured 0.14 µs an observation, prometheus_client's own 0.73 µs."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """(cumulative counts by upper bound, sum), as HistogramMetricFamily wants them."""
        total = 0
        pairs: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs, self._sum


@dataclasses.dataclass(slots=True)
class ModelSeries:
    """Numbers of one served model."""

    time_to_first_token: Histogram = dataclasses.field(default_factory=Histogram)
    inter_token_latency: Histogram = dataclasses.field(default_factory=Histogram)
    request_latency: Histogram = dataclasses.field(default_factory=Histogram)
    num_waiting: int = 0  # requests submitted, no token yet
    num_running: int = 0  # requests with a token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_resumes: int = 0
    num_disconnects: int = 0
    finished: Counter[str] = dataclasses.field(default_factory=Counter)  # choices by finish reason


class RequestMeter:
    """Measures one request from its arrival to its end."""

    __slots__ = ("_arrived", "_is_ended", "_is_started", "_series")

    def __init__(self, series: ModelSeries, arrived: float) -> None:
        self._series = series
        self._arrived = arrived
        self._is_started = False
        self._is_ended = False
        series.num_waiting += 1

    def on_tokens(self, num_new: int, gap_s: float | None, now: float) -> None:
        """A frame brought tokens of one choice; gap_s: since its previous frame, None for the first."""
        series = self._series
        series.generation_tokens += num_new
        if gap_s is not None:
            series.inter_token_latency.observe(gap_s)
        elif not self._is_started:
            self._is_started = True
            series.num_waiting -= 1
            series.num_running += 1
            series.time_to_first_token.observe(now - self._arrived)

    def on_choice_end(self, reason: str, num_resumes: int) -> None:
        self._series.finished[reason] += 1
        self._series.num_resumes += num_resumes

    def on_end(self, now: float, prompt_tokens: int, cached_tokens: int, is_disconnect: bool) -> None:
        """The request is over, however it ended. Idempotent."""
        if self._is_ended:
            return
        self._is_ended = True
        series = self._series
        if self._is_started:
            series.num_running -= 1
        else:
            series.num_waiting -= 1
        series.prompt_tokens += prompt_tokens
        series.cached_tokens += cached_tokens
        series.num_disconnects += is_disconnect
        series.request_latency.observe(now - self._arrived)


class Metrics(Collector):
    """Everything that one gateway process counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.responses: Counter[tuple[str, str]] = Counter()  # (route, status)
        self.errors: Counter[str] = Counter()  # error code
        self.num_connections: Callable[[], int] = lambda: 0
        self._models: dict[str, ModelSeries] = {}

    def model(self, name: str) -> ModelSeries:
        """Series of a served model; beyond MAX_MODELS all others share one."""
        if name not in self._models and len(self._models) >= MAX_MODELS:
            name = "other"
        return self._models.setdefault(name, ModelSeries())

    def collect(self) -> Iterator[Metric]:
        yield _counter(
            "argosy_responses", "Responses by route and status.", ("route", "status"), self.responses.items()
        )
        yield _counter(
            "argosy_errors", "Errors by code.", ("code",), (((code,), count) for code, count in self.errors.items())
        )
        connections = GaugeMetricFamily("argosy_connections", "Open client connections.")
        connections.add_metric((), self.num_connections())
        yield connections
        models = list(self._models.items())
        for name, documentation, gauge in _GAUGES:
            gauges = GaugeMetricFamily(name, documentation, labels=("model_name",))
            for model, series in models:
                gauges.add_metric((model,), gauge(series))
            yield gauges
        for name, documentation, count in _COUNTERS:
            pairs = (((model,), count(series)) for model, series in models)
            yield _counter(name, documentation, ("model_name",), pairs)
        for name, documentation, histogram in _HISTOGRAMS:
            histograms = HistogramMetricFamily(name, documentation, labels=("model_name",))
            for model, series in models:
                buckets, total = histogram(series).buckets()
                histograms.add_metric((model,), buckets, total)
            yield histograms
        for name, label in (("argosy_choices_finished", "reason"), ("vllm:request_success", "finished_reason")):
            reasons = (((model, reason), n) for model, series in models for reason, n in series.finished.items())
            yield _counter(name, "Finished choices by reason.", ("model_name", label), reasons)


def _counter(
    name: str, documentation: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


_GAUGES: tuple[tuple[str, str, Callable[[ModelSeries], float]], ...] = (
    ("argosy_requests_running", "Requests that have a token.", lambda series: series.num_running),
    ("argosy_requests_waiting", "Requests submitted that have no token yet.", lambda series: series.num_waiting),
    ("vllm:num_requests_running", "Requests that have a token.", lambda series: series.num_running),
    ("vllm:num_requests_waiting", "Requests submitted that have no token yet.", lambda series: series.num_waiting),
)
_COUNTERS: tuple[tuple[str, str, Callable[[ModelSeries], float]], ...] = (
    ("argosy_prompt_tokens", "Prompt tokens of ended requests.", lambda series: series.prompt_tokens),
    ("argosy_cached_tokens", "Prompt tokens read from the prefix cache.", lambda series: series.cached_tokens),
    ("argosy_generation_tokens", "Tokens generated.", lambda series: series.generation_tokens),
    ("argosy_resumes", "Times a choice moved to another replica.", lambda series: series.num_resumes),
    ("argosy_disconnects", "Requests whose client left early.", lambda series: series.num_disconnects),
    ("vllm:prompt_tokens", "Prompt tokens of ended requests.", lambda series: series.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda series: series.generation_tokens),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelSeries], Histogram]], ...] = (
    ("argosy_time_to_first_token_seconds", "Arrival to first token.", lambda series: series.time_to_first_token),
    ("argosy_inter_token_seconds", "Between frames of a choice.", lambda series: series.inter_token_latency),
    ("argosy_request_seconds", "Arrival to end.", lambda series: series.request_latency),
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", lambda series: series.time_to_first_token),
    ("vllm:inter_token_latency_seconds", "Between frames of a choice.", lambda series: series.inter_token_latency),
    ("vllm:e2e_request_latency_seconds", "Arrival to end.", lambda series: series.request_latency),
)
