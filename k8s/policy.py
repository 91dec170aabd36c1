"""Who may take what: Pod Security, priorities, quota, limits."""

from __future__ import annotations

from k8s.network import network_policies
from k8s.objects import APP, PRIORITIES, Object, cluster_metadata, metadata, name_of, priority_class
from k8s.sizing import Sizing
from k8s.spec import ServingSpec


def objects(sizing: Sizing) -> list[Object]:
    """Namespace, PriorityClasses, ResourceQuota, LimitRange, NetworkPolicies."""
    spec = sizing.spec
    return [
        _namespace(spec),
        *(_priority_class(spec, kind, value) for kind, value in PRIORITIES.items()),
        _quota(sizing),
        _limit_range(spec),
        *network_policies(spec),
    ]


def _namespace(spec: ServingSpec) -> Object:
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("audit", "enforce", "warn")}
    described = cluster_metadata(spec, spec.namespace, "namespace", labels=levels)
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": described}


def _priority_class(spec: ServingSpec, kind: str, value: int) -> Object:
    preempts = kind not in ("batch", "balloon")
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "description": f"{APP}: {kind}",
        "globalDefault": False,
        "kind": "PriorityClass",
        "metadata": cluster_metadata(spec, priority_class(spec, kind), "policy"),
        "preemptionPolicy": "PreemptLowerPriority" if preempts else "Never",
        "value": value,
    }


def _quota(sizing: Sizing) -> Object:
    """A runaway autoscaler or a typing error stops here. Pods: twice of everything, and room for Jobs."""
    spec = sizing.spec
    pods = 2 * spec.gateway.max_replicas + sizing.quota_pods + 2 * 3 + 50
    hard = {
        "pods": str(pods),
        "services.loadbalancers": "0",
        "services.nodeports": "0",
    }
    if spec.has_gpus:
        hard[f"requests.{spec.cluster.gpu_resource}"] = str(sizing.quota_gpus)
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": metadata(spec, name_of(spec, "quota"), "policy"),
        "spec": {"hard": dict(sorted(hard.items()))},
    }


def _limit_range(spec: ServingSpec) -> Object:
    """For containers that say nothing: KubeRay's own Jobs and debuggers."""
    return {
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": metadata(spec, name_of(spec, "defaults"), "policy"),
        "spec": {
            "limits": [
                {
                    "default": {"memory": "512Mi"},
                    "defaultRequest": {"cpu": "100m", "memory": "512Mi"},
                    "type": "Container",
                }
            ]
        },
    }
