"""How an API server puts objects together: fields and their owners, merge patches, selectors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

PLURALS = {
    "Namespace": "v1/namespaces",
    "Node": "v1/nodes",
    "Pod": "v1/pods",
    "Event": "v1/events",
    "Secret": "v1/secrets",
    "ConfigMap": "v1/configmaps",
    "Service": "v1/services",
    "ServiceAccount": "v1/serviceaccounts",
    "PersistentVolumeClaim": "v1/persistentvolumeclaims",
    "ResourceClaimTemplate": "resource.k8s.io/v1/resourceclaimtemplates",
    "ResourceQuota": "v1/resourcequotas",
    "LimitRange": "v1/limitranges",
    "Deployment": "apps/v1/deployments",
    "DaemonSet": "apps/v1/daemonsets",
    "Job": "batch/v1/jobs",
    "HorizontalPodAutoscaler": "autoscaling/v2/horizontalpodautoscalers",
    "PodDisruptionBudget": "policy/v1/poddisruptionbudgets",
    "NetworkPolicy": "networking.k8s.io/v1/networkpolicies",
    "PriorityClass": "scheduling.k8s.io/v1/priorityclasses",
    "StorageClass": "storage.k8s.io/v1/storageclasses",
    "ClusterRole": "rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "rbac.authorization.k8s.io/v1/clusterrolebindings",
    "EndpointSlice": "discovery.k8s.io/v1/endpointslices",
    "CustomResourceDefinition": "apiextensions.k8s.io/v1/customresourcedefinitions",
    "APIService": "apiregistration.k8s.io/v1/apiservices",
    "RayService": "ray.io/v1/rayservices",
    "RayCluster": "ray.io/v1/rayclusters",
    "ScaledObject": "keda.sh/v1alpha1/scaledobjects",
    "Gateway": "gateway.networking.k8s.io/v1/gateways",
    "HTTPRoute": "gateway.networking.k8s.io/v1/httproutes",
    "ServiceMonitor": "monitoring.coreos.com/v1/servicemonitors",
    "PodMonitor": "monitoring.coreos.com/v1/podmonitors",
    "PrometheusRule": "monitoring.coreos.com/v1/prometheusrules",
}
CLUSTER_SCOPED = (
    "APIService",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "Namespace",
    "Node",
    "PriorityClass",
    "StorageClass",
)


def without_identity(thing: Object) -> Object:
    kept = {key: value for key, value in thing.items() if key not in ("apiVersion", "kind", "status", "metadata")}
    metadata = {key: value for key, value in thing.get("metadata", {}).items() if key in ("labels", "annotations")}
    return kept | ({"metadata": metadata} if metadata else {})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Lists are whole: nothing here merges them by their items' names."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def laid(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: laid(old.get(key), value) for key, value in new.items()}
    return copy.deepcopy(new)


def merge(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def remove(thing: Object, path: tuple[Any, ...]) -> None:
    place: Any = thing
    for part in path[:-1]:
        place = place.get(part) if isinstance(place, dict) else None
    if isinstance(place, dict):
        place.pop(path[-1], None)


def chosen(thing: Object, params: dict[str, str]) -> bool:
    labels = thing["metadata"].get("labels") or {}
    for term in filter(None, params.get("labelSelector", "").split(",")):
        key, _, value = term.partition("=")
        if (value and labels.get(key) != value) or (not value and key not in labels):
            return False
    for term in filter(None, params.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        place: Any = thing
        for part in path.split("."):
            place = (place or {}).get(part)
        if place != value:
            return False
    return True
