"""What scales the gateways in the HorizontalPodAutoscaler's place: KEDA, by the streams that Prometheus counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

from k8s import deployment
from k8s.objects import Object
from serving.metrics import promql
from tests.k8s.invariants import invariant
from tests.k8s.invariants_of_capacity import Scaler, scalers
from tests.k8s.manifests import Manifests

SCALED = ("keda.sh/v1alpha1", "ScaledObject", "argosy-gateway")
HPA = ("autoscaling/v2", "HorizontalPodAutoscaler", "argosy-gateway")


def without_keda(m: Manifests) -> dict[tuple[str, str, str], Object]:
    """The objects of the same deployment whose gateways an HPA scales."""
    rest = tuple(name for name in m.spec.components if name != "autoscale-keda")
    return deployment.objects(dataclasses.replace(m.spec, components=rest))


def trigger(m: Manifests, kind: str) -> Object:
    [found] = [trigger for trigger in m.objects[SCALED]["spec"]["triggers"] if trigger["type"] == kind]
    return found


def _spec(m: Manifests) -> Object:
    found: Object = m.objects[SCALED]["spec"]
    return found


@invariant(
    lambda m: m.objects.update({HPA: without_keda(m)[HPA]}),
    lambda m: m.objects.pop(SCALED),
    lambda m: m.objects.update({("keda.sh/v1alpha1", "ScaledObject", "other"): m.objects[SCALED]}),
    lambda m: _spec(m)["scaleTargetRef"].update(name="argosy-gatway"),
    lambda m: _spec(m)["scaleTargetRef"].update(kind="StatefulSet"),
    lambda m: m.one("Deployment", "gateway")["spec"].update(replicas=3),
    overlay="edge-all",
)
def one_autoscaler_for_a_deployment(m: Manifests) -> Iterator[str]:
    targets = [(s.target["apiVersion"], s.target["kind"], s.target["name"]) for s in scalers(m)]
    for target in sorted(set(targets)):
        if target not in m.objects:
            yield f"there is no {target}"
        elif "replicas" in m.objects[target]["spec"]:
            yield f"{target}: the number is its autoscaler's to write"
        if targets.count(target) > 1:
            yield f"{targets.count(target)} autoscalers undo each other's decisions on {target}"
    if m.spec.has("autoscale-keda") != (SCALED in m.objects):
        yield "the component and its ScaledObject are not there together"


@invariant(
    lambda m: _spec(m).update(minReplicaCount=1),
    lambda m: _spec(m).pop("minReplicaCount"),
    lambda m: _spec(m).update(maxReplicaCount=13),
    lambda m: _spec(m).update(idleReplicaCount=0),
    lambda m: _spec(m).pop("advanced"),
    lambda m: _spec(m)["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleUp"].clear(),
    lambda m: _spec(m).update(cooldownPeriod=30),
    lambda m: trigger(m, "cpu")["metadata"].update(value="90"),
    lambda m: _spec(m)["triggers"].pop(),
    lambda m: trigger(m, "prometheus")["metadata"].update(threshold="20"),
    overlay="edge-all",
)
def keda_scales_within_the_bounds_and_at_the_pace_of_the_autoscaler(m: Manifests) -> Iterator[str]:
    if SCALED not in m.objects:
        return
    spec = _spec(m)
    hpa = without_keda(m)[HPA]["spec"]
    wanted = Scaler(hpa["scaleTargetRef"], hpa["minReplicas"], hpa["maxReplicas"], hpa["behavior"])
    if scalers(m) != [wanted] or "idleReplicaCount" in spec:
        yield f"it is not {wanted}"
    if spec.get("cooldownPeriod") != hpa["behavior"]["scaleDown"]["stabilizationWindowSeconds"]:
        yield f"gateways leave after {spec.get('cooldownPeriod')} s"
    shares = [t["metadata"]["value"] for t in spec["triggers"] if t["type"] == "cpu"]
    [resource] = [metric["resource"] for metric in hpa["metrics"] if metric["type"] == "Resource"]
    if shares != [str(resource["target"]["averageUtilization"])]:
        yield f"a CPU is full at {shares} %"
    if trigger(m, "prometheus")["metadata"]["threshold"] != str(m.spec.gateway.target_in_flight):
        yield "a pod is full at another number of streams"


@invariant(
    lambda m: _spec(m).pop("fallback"),
    lambda m: _spec(m)["fallback"].update(replicas=3),
    lambda m: trigger(m, "prometheus").update(metricType="Value"),
    lambda m: trigger(m, "prometheus")["metadata"].pop("ignoreNullValues"),
    lambda m: trigger(m, "prometheus")["metadata"].update(ignoreNullValues="true"),
    lambda m: trigger(m, "prometheus")["metadata"].update(serverAddress="http://prometheus:9090"),
    overlay="edge-all",
)
def without_prometheus_no_gateway_is_taken_away(m: Manifests) -> Iterator[str]:
    """KEDA's fallback is for AverageValue alone, and an empty answer counts as 0 unless nulls are not ignored."""
    if SCALED not in m.objects:
        return
    asked = trigger(m, "prometheus")
    if _spec(m).get("fallback", {}).get("replicas") != m.spec.gateway.max_replicas:
        yield f"what is full loses gateways to {_spec(m).get('fallback')}"
    if asked.get("metricType") != "AverageValue" or asked["metadata"].get("ignoreNullValues") != "false":
        yield "there is no fallback"
    if asked["metadata"]["serverAddress"] != m.spec.cluster.prometheus_url:
        yield "somebody else is asked"


def _query(old: str, new: str) -> Callable[[Manifests], object]:
    def alter(m: Manifests) -> None:
        asked = trigger(m, "prometheus")["metadata"]
        assert old in asked["query"]
        asked["query"] = asked["query"].replace(old, new)

    return alter


@invariant(
    _query("argosy_requests_running", "argosy_streams"),
    _query("argosy_requests_running", "argosy_request_seconds"),
    _query("argosy_requests_running", "argosy_prompt_tokens_total"),
    _query("namespace=", "kube_namespace="),
    _query('namespace="argosy"', 'namespace="other"'),
    _query("argosy-gateway-", "argosy-gatway-"),
    _query("-[a-z0-9]+-[a-z0-9]+", ".*"),
    overlay="edge-all",
)
def keda_counts_the_streams_of_our_gateways(m: Manifests) -> Iterator[str]:
    """Names and labels against the catalogue of metrics, the selector against what a Deployment calls its pods."""
    if SCALED not in m.objects:
        return
    text = trigger(m, "prometheus")["metadata"]["query"]
    try:
        metrics = promql.check(text, promql.series_labels())
    except promql.PromqlError as error:
        yield str(error)
        return
    if metrics != {"argosy_requests_running", "argosy_requests_waiting"}:
        yield f"{metrics} are not the requests that a gateway holds"
    selectors = re.findall(r'namespace="([^"]*)",pod=~"([^"]*)"', text)
    if len(selectors) != len(metrics) or {namespace for namespace, _ in selectors} != {m.spec.namespace}:
        yield f"streams of other namespaces count: {text}"
    name = m.one("Deployment", "gateway")["metadata"]["name"]
    for _, pattern in selectors:
        if not re.fullmatch(pattern, f"{name}-7c9d8b6f5d-x2x9q") or re.fullmatch(
            pattern, f"{name}-lab-7c9d8b6f5d-x2x9q"
        ):
            yield f"{pattern} is not just the pods of {name}"
