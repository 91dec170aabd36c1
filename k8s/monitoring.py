"""What watches: scrape targets, and the rules and dashboard that serving/metrics makes, wrapped for their operators."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Final

import yaml

from k8s.objects import GATEWAY, HEAD, WORKER, Object, metadata, name_of, pods_of, selector
from k8s.sizing import Sizing

FOLDER: Final = Path(__file__).parent / "base" / "monitoring"
RULES_FILE: Final = FOLDER / "argosy.rules.yaml"
DASHBOARD_FILE: Final = FOLDER / "dashboards" / "argosy.json"

# A page of ours has a bounded number of series; these stop whatever else one day answers under its name.
_LIMITS: Final = {"labelLimit": 32, "labelNameLengthLimit": 128, "labelValueLengthLimit": 512}


def objects(sizing: Sizing) -> list[Object]:
    """The dashboard; ServiceMonitor, PodMonitor and PrometheusRule where the cluster knows them."""
    found = [_dashboard(sizing)]
    if sizing.spec.cluster.has_prometheus_operator:
        found += [_service_monitor(sizing), _pod_monitor(sizing), _rules(sizing)]
    return found


def _service_monitor(sizing: Sizing) -> Object:
    spec = sizing.spec
    endpoint = {
        "interval": "15s",
        "metricRelabelings": [
            {"action": "drop", "regex": "python_gc_.*", "sourceLabels": ["__name__"]},
            {"action": "labeldrop", "regex": "request_id"},
        ],
        "path": "/metrics",
        "port": "http",
        "scrapeTimeout": "10s",
    }
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            "endpoints": [endpoint],
            "sampleLimit": 50_000,
            "selector": {"matchLabels": selector(spec, GATEWAY)},
            **_LIMITS,
        },
    }


def _pod_monitor(sizing: Sizing) -> Object:
    """Ray's own numbers: nodes, actors, the object store. Those of replicas are on the gateways' page."""
    spec = sizing.spec
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(spec, name_of(spec, "ray"), "engine"),
        "spec": {
            "podMetricsEndpoints": [{"interval": "30s", "path": "/metrics", "port": "metrics", "scrapeTimeout": "10s"}],
            "podTargetLabels": ["ray.io/cluster", "ray.io/group"],
            "sampleLimit": 50_000,
            "selector": pods_of(spec, HEAD, WORKER),
            **_LIMITS,
        },
    }


def _rules(sizing: Sizing) -> Object:
    spec = sizing.spec
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata(spec, name_of(spec, "rules"), "monitoring"),
        "spec": copy.deepcopy(_groups()),
    }


@functools.cache
def _groups() -> Object:
    found: Object = yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))
    return found


def _dashboard(sizing: Sizing) -> Object:
    """A ConfigMap that Grafana's sidecar finds by its label."""
    spec = sizing.spec
    described = metadata(spec, name_of(spec, "dashboard"), "monitoring")
    described["labels"]["grafana_dashboard"] = "1"
    text = json.dumps(json.loads(DASHBOARD_FILE.read_text(encoding="utf-8")), indent=1) + "\n"
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": described, "data": {"argosy.json": text}}
