"""Component gpu-health: a node's GPUs take work only after a test, and none after a fault of their hardware.

Whoever makes the nodes lets them join with the taint `argosy/gpu-unverified:NoSchedule`. Its ClusterRole (read and
patch nodes) is the one thing here that a namespace's owner cannot apply.
"""

from __future__ import annotations

from k8s.gpu_guard import BEAT_FILE, FAULT, PREFLIGHT_S, UNVERIFIED
from k8s.network import network_policy, ports
from k8s.objects import (
    GPU_HEALTH,
    PULL_POLICY,
    Object,
    cluster_metadata,
    container_security,
    gpu_tolerations,
    labels,
    memory_volume,
    metadata,
    name_of,
    pod,
    scratch_volume,
    selector,
    service_account,
)
from k8s.patches import Key, key_of
from k8s.sizing import Sizing
from k8s.spec import ServingSpec

_ALIVE = f"test $(( $(date +%s) - $(stat -c %Y {BEAT_FILE}) )) -lt {int(PREFLIGHT_S) + 120}"


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    guard = {"matchLabels": selector(spec, GPU_HEALTH)}
    to = [{"ipBlock": {"cidr": spec.cluster.api_server_cidr}}]
    for thing in (
        service_account(spec, name_of(spec, GPU_HEALTH), GPU_HEALTH),
        *_rights(spec),
        _daemon_set(spec),
        network_policy(spec, "gpu-health", guard, egress=[{"ports": ports(443, 6443), "to": to}]),
    ):
        objects[key_of(thing)] = thing


def _rights(spec: ServingSpec) -> list[Object]:
    name = name_of(spec, spec.namespace, GPU_HEALTH) if spec.namespace != spec.name else name_of(spec, GPU_HEALTH)
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    subject = {"kind": "ServiceAccount", "name": name_of(spec, GPU_HEALTH), "namespace": spec.namespace}
    return [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": cluster_metadata(spec, name, GPU_HEALTH),
            "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": cluster_metadata(spec, name, GPU_HEALTH),
            "roleRef": role,
            "subjects": [subject],
        },
    ]


def _daemon_set(spec: ServingSpec) -> Object:
    container = {
        "name": "guard",
        "image": spec.images.engine,
        "imagePullPolicy": PULL_POLICY,
        "args": ["$(NODE_NAME)"],
        "command": ["python", "-m", "k8s.gpu_guard"],
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            # All GPUs without holding any: it watches, and tests them while nothing else may run.
            {"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "compute,utility"},
            {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"},
        ],
        "livenessProbe": {
            "exec": {"command": ["/bin/sh", "-c", _ALIVE]},
            "failureThreshold": 3,
            "periodSeconds": 60,
            "timeoutSeconds": 5,
        },
        "resources": {"limits": {"memory": "8Gi"}, "requests": {"cpu": "100m", "memory": "8Gi"}},
        "securityContext": container_security(),
        "startupProbe": {
            "exec": {"command": ["/bin/sh", "-c", f"test -f {BEAT_FILE}"]},
            "failureThreshold": int(PREFLIGHT_S) // 10 + 12,
            "periodSeconds": 10,
            "timeoutSeconds": 5,
        },
        "volumeMounts": [{"mountPath": "/dev/shm", "name": "shm"}, {"mountPath": "/tmp", "name": "tmp"}],
    }
    template = pod(
        spec,
        service_account=name_of(spec, GPU_HEALTH),
        priority="head",
        grace_s=5,
        automountServiceAccountToken=True,
        containers=[container],
        nodeSelector={spec.cluster.gpu_node_label: "true"},
        tolerations=[
            *gpu_tolerations(spec),
            {"effect": "NoSchedule", "key": UNVERIFIED, "operator": "Exists"},
            {"key": FAULT, "operator": "Exists"},
        ],
        volumes=[memory_volume("shm", "1Gi"), scratch_volume("tmp", "1Gi")],
    )
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata(spec, name_of(spec, GPU_HEALTH), GPU_HEALTH),
        "spec": {
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": selector(spec, GPU_HEALTH)},
            "template": {"metadata": {"labels": labels(spec, GPU_HEALTH)}, "spec": template},
            "updateStrategy": {"rollingUpdate": {"maxUnavailable": "10%"}, "type": "RollingUpdate"},
        },
    }
