"""Every metric, described once: the page, the rules, the dashboard and the documentation come from here."""

from __future__ import annotations

from serving.metrics.description import Metric
from serving.metrics.of_gateway import MODEL_METRICS, PROCESS_METRICS, VLLM_METRICS
from serving.metrics.of_replica import REPLICA_METRICS

METRICS: tuple[Metric, ...] = (*PROCESS_METRICS, *MODEL_METRICS, *REPLICA_METRICS, *VLLM_METRICS)
"""All of them, in the order of the page."""

BY_NAME = {metric.name: metric for metric in METRICS}
