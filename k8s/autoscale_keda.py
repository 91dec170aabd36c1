"""Component autoscale-keda: KEDA decides how many gateways there are, by the streams that Prometheus counts.

It takes the place of the HorizontalPodAutoscaler: KEDA makes one of its own, and two on one Deployment undo each
other's decisions. Nothing of ours is asked by KEDA, which talks to Prometheus and the API server: no policy changes.
"""

from __future__ import annotations

import copy
from typing import Final

from k8s.gateway import BEHAVIOR, CPU_PERCENT
from k8s.objects import GATEWAY, Object, metadata, name_of
from k8s.patches import Key, key_of
from k8s.sizing import Sizing
from k8s.spec import ServingSpec

STREAMS: Final = ("argosy_requests_running", "argosy_requests_waiting")
"""Requests with and without a token: what a gateway holds. A connection that a proxy keeps for later is none."""

POLL_S: Final = 15  # as often as the HPA controller looks
FAILURES: Final = 3  # polls in a row


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    name = name_of(spec, "gateway")
    objects.pop(("autoscaling/v2", "HorizontalPodAutoscaler", name), None)
    objects["apps/v1", "Deployment", name]["spec"].pop("replicas", None)  # is KEDA's to write
    scaled = _scaled_object(spec)
    objects[key_of(scaled)] = scaled


def query(spec: ServingSpec) -> str:
    """Streams of all gateways, as PromQL: one number. Pods by the names that a Deployment gives them."""
    pods = f'namespace="{spec.namespace}",pod=~"{name_of(spec, "gateway")}-[a-z0-9]+-[a-z0-9]+"'
    return " + ".join(f"sum({metric}{{{pods}}})" for metric in STREAMS)


def _scaled_object(spec: ServingSpec) -> Object:
    gateway = spec.gateway
    streams = {
        "type": "prometheus",
        "name": "streams",
        "metricType": "AverageValue",  # the query's number over the pods there are; the only type with a fallback
        "metadata": {
            # No series is not no streams: nobody scrapes, or no gateway answers.
            "ignoreNullValues": "false",
            "query": query(spec),
            "serverAddress": spec.cluster.prometheus_url,
            "threshold": str(gateway.target_in_flight),
        },
    }
    cpu = {"type": "cpu", "name": "cpu", "metricType": "Utilization", "metadata": {"value": str(CPU_PERCENT)}}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": copy.deepcopy(BEHAVIOR)}},
            "cooldownPeriod": BEHAVIOR["scaleDown"]["stabilizationWindowSeconds"],
            # All of them: who sees nothing must not take away gateways that are full.
            "fallback": {"failureThreshold": FAILURES, "replicas": gateway.max_replicas},
            "maxReplicaCount": gateway.max_replicas,
            "minReplicaCount": gateway.min_replicas,
            "pollingInterval": POLL_S,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name_of(spec, "gateway")},
            "triggers": [streams, cpu],
        },
    }
