"""What one gateway process counts, and how /metrics shows it.

The token path adds to plain numbers, once per engine frame and choice; prometheus_client formats them when it is
asked. Which series there are is the catalogue's business alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from serving.errors import ArgosyError
from serving.metrics.catalogue import METRICS
from serving.metrics.description import OTHER, Metric
from serving.metrics.histogram import Histogram
from serving.metrics.labels import CODE, MAX_MODELS, MAX_REPLICAS, MAX_ROUTES, MAX_STATUSES, SHED_REASON
from serving.metrics.series import ModelSeries
from serving.metrics.snapshot import PlaneView, Snapshot


class Metrics(Collector):
    """Everything that one gateway process counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.responses: Counter[tuple[str, str]] = Counter()  # (route, status)
        self.errors: Counter[str] = Counter()  # error code
        self.sheds: Counter[str] = Counter()  # reason
        self.num_connections: Callable[[], int] = lambda: 0
        self.num_spans_dropped: Callable[[], int] = lambda: 0
        self.plane: Callable[[], PlaneView] = PlaneView
        self._models: dict[str, ModelSeries] = {}
        self._routes: set[str] = set()
        self._statuses: set[str] = set()

    def model(self, name: str) -> ModelSeries:
        """Series of a served model; beyond MAX_MODELS all others share one."""
        if name not in self._models and len(self._models) >= MAX_MODELS:
            name = OTHER
        return self._models.setdefault(name, ModelSeries())

    def count_response(self, route: str, status: int) -> None:
        """route: the path of a route, never the path that a client asked for."""
        self.responses[
            _bounded(route, self._routes, MAX_ROUTES), _bounded(str(status), self._statuses, MAX_STATUSES)
        ] += 1

    def count_error(self, error: ArgosyError) -> None:
        """A request that was refused or failed before its reply began."""
        self.errors[error.error_code if error.error_code in CODE.values else OTHER] += 1
        self._count_shed(error)

    def count_broken(self, model: str, error: ArgosyError) -> None:
        """A reply that had begun and ended in an error."""
        self.model(model).broken[error.error_code if error.error_code in CODE.values else OTHER] += 1
        self._count_shed(error)

    def _count_shed(self, error: ArgosyError) -> None:
        if error.reason is not None:
            self.sheds[error.reason if error.reason in SHED_REASON.values else OTHER] += 1

    def snapshot(self) -> Snapshot:
        """Everything, read now. The counts are the living ones: read them in the same turn of the event loop."""
        plane = self.plane()
        for name in plane.models:
            self.model(name)  # an autoscaler reads zeros before the first request, not nothing
        return Snapshot(
            responses=self.responses,
            errors=self.errors,
            sheds=self.sheds,
            num_connections=self.num_connections(),
            num_spans_dropped=self.num_spans_dropped(),
            models=dict(self._models),
            plane=plane,
            replicas=plane.replicas[:MAX_REPLICAS],
        )

    def collect(self) -> Iterator[Family]:
        snapshot = self.snapshot()
        return (_family(metric, snapshot) for metric in METRICS)


def _bounded(value: str, known: set[str], limit: int) -> str:
    if value not in known:
        if len(known) >= limit:
            return OTHER
        known.add(value)
    return value


def _family(metric: Metric, snapshot: Snapshot) -> Family:
    family: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
    if metric.kind == "histogram":
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.label_names)
    elif metric.kind == "counter":
        family = CounterMetricFamily(metric.name, metric.help, labels=metric.label_names)
    else:
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.label_names)
    for labels, value in metric.feed(snapshot):
        if isinstance(value, Histogram):
            assert isinstance(family, HistogramMetricFamily)
            family.add_metric(labels, *value.buckets())
        else:
            assert not isinstance(family, HistogramMetricFamily)
            family.add_metric(labels, value)
    return family
