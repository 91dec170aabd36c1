"""The gateway: pods without torch and Ray that may come and go while streams go on."""

from __future__ import annotations

import copy

from k8s.amounts import cpus, quantity
from k8s.objects import (
    GATEWAY,
    GATEWAY_PORT,
    OPERATOR_PATH,
    PULL_POLICY,
    SECRET_FILE,
    SECRET_PATH,
    SERVE_PORT,
    SETTINGS_PATH,
    Object,
    container_security,
    engine_secret,
    http_probe,
    labels,
    metadata,
    name_of,
    operator_secret,
    pod,
    scratch_volume,
    selector,
    service_account,
    spread,
)
from k8s.settings import gateway_config_map
from k8s.sizing import GATEWAY_PRE_STOP_S, Sizing

IN_FLIGHT_METRIC = "argosy_connections"
"""What the autoscaler counts: every stream is a connection."""

CPU_PERCENT = 70  # of what a pod asks for, at which another is added

BEHAVIOR: Object = {
    "scaleDown": {
        "policies": [{"periodSeconds": 60, "type": "Percent", "value": 10}],
        "stabilizationWindowSeconds": 300,
    },
    "scaleUp": {"policies": [{"periodSeconds": 15, "type": "Percent", "value": 100}]},
}
"""Quick to come, slow to go: a gateway that leaves waits for its streams."""


def objects(sizing: Sizing) -> list[Object]:
    """ServiceAccount, ConfigMap, Deployment, Service, PodDisruptionBudget; an autoscaler where there is a choice."""
    spec = sizing.spec
    found = [
        service_account(spec, name_of(spec, "gateway"), GATEWAY),
        gateway_config_map(sizing),
        _deployment(sizing),
        _service(sizing),
        _disruption_budget(sizing),
    ]
    return found + ([_autoscaler(sizing)] if spec.gateway.max_replicas > spec.gateway.min_replicas else [])


def directory_url(sizing: Sizing) -> str:
    """The directory behind KubeRay's Service for Serve's proxies: <RayService>-serve-svc, by the name that the first
    search domain completes."""
    return f"http://{sizing.spec.name}-serve-svc:{SERVE_PORT}/directory"


def _container(sizing: Sizing) -> Object:
    spec = sizing.spec
    memory = quantity(spec.gateway.memory_bytes)
    return {
        "name": "gateway",
        "image": spec.images.gateway,
        "imagePullPolicy": PULL_POLICY,
        "args": [
            "gateway",
            f"--config={SETTINGS_PATH}/settings.yaml",
            f"--directory-url={directory_url(sizing)}",
            f"--secret-file={SECRET_FILE}",
        ],
        "lifecycle": {"preStop": {"sleep": {"seconds": GATEWAY_PRE_STOP_S}}},
        "livenessProbe": http_probe("/livez", "http", period_s=10, timeout_s=5, failures=6),
        "ports": [{"containerPort": GATEWAY_PORT, "name": "http", "protocol": "TCP"}],
        "readinessProbe": http_probe("/readyz", "http", period_s=5, timeout_s=3, failures=2),
        "resources": {
            "limits": {"memory": memory},  # no limit of CPU: throttling is latency
            "requests": {"cpu": cpus(spec.gateway.cpus), "memory": memory},
        },
        "securityContext": container_security(),
        # /livez, not /readyz: a gateway that waits for its first replica must not be restarted for it.
        "startupProbe": http_probe("/livez", "http", period_s=1, timeout_s=3, failures=60),
        "volumeMounts": [
            {"mountPath": SETTINGS_PATH, "name": "settings", "readOnly": True},
            {"mountPath": SECRET_PATH, "name": "engine-secret", "readOnly": True},
            {"mountPath": OPERATOR_PATH, "name": "operator-token", "readOnly": True},
            {"mountPath": "/tmp", "name": "tmp"},
        ],
    }


def _deployment(sizing: Sizing) -> Object:
    spec = sizing.spec
    generation = "pod-template-hash"
    constraints = [spread(spec, GATEWAY, "kubernetes.io/hostname", is_required=False, generation=generation)]
    if spec.is_prod:
        zone = "topology.kubernetes.io/zone"
        constraints.insert(0, spread(spec, GATEWAY, zone, is_required=True, generation=generation))
    template = pod(
        spec,
        service_account=name_of(spec, "gateway"),
        priority="gateway",
        grace_s=sizing.gateway_grace_s,
        containers=[_container(sizing)],
        topologySpreadConstraints=constraints,
        volumes=[
            {"configMap": {"name": gateway_config_map(sizing)["metadata"]["name"]}, "name": "settings"},
            {"name": "engine-secret", "secret": {"defaultMode": 0o440, "secretName": engine_secret(spec)}},
            {
                "name": "operator-token",
                "secret": {"defaultMode": 0o440, "optional": True, "secretName": operator_secret(spec)},
            },
            scratch_volume("tmp", "256Mi"),
        ],
    )
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            # Where an autoscaler acts, the number is its own to write.
            **(
                {} if spec.gateway.max_replicas > spec.gateway.min_replicas else {"replicas": spec.gateway.min_replicas}
            ),
            "progressDeadlineSeconds": 600,
            "revisionHistoryLimit": 10,
            "selector": {"matchLabels": selector(spec, GATEWAY)},
            "strategy": {"rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0}, "type": "RollingUpdate"},
            "template": {"metadata": {"labels": labels(spec, GATEWAY)}, "spec": template},
        },
    }


def _service(sizing: Sizing) -> Object:
    spec = sizing.spec
    port = {"appProtocol": "http", "name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            "ports": [port],
            "selector": selector(spec, GATEWAY),
            "trafficDistribution": "PreferSameZone",
            "type": "ClusterIP",
        },
    }


def _disruption_budget(sizing: Sizing) -> Object:
    spec = sizing.spec
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(spec, GATEWAY)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _autoscaler(sizing: Sizing) -> Object:
    spec = sizing.spec
    cpu = {"type": "Utilization", "averageUtilization": CPU_PERCENT}
    metrics: list[Object] = [{"type": "Resource", "resource": {"name": "cpu", "target": cpu}}]
    if spec.cluster.has_pod_metrics:
        target = {"type": "AverageValue", "averageValue": str(spec.gateway.target_in_flight)}
        metrics.insert(0, {"type": "Pods", "pods": {"metric": {"name": IN_FLIGHT_METRIC}, "target": target}})
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            "behavior": copy.deepcopy(BEHAVIOR),
            "maxReplicas": spec.gateway.max_replicas,
            "metrics": metrics,
            "minReplicas": spec.gateway.min_replicas,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name_of(spec, "gateway")},
        },
    }
