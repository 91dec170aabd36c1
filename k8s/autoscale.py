"""Component autoscale-ray: Serve decides how many replicas there are, by a policy of ours; Ray's autoscaler makes pods.

Nothing else can: neither RayService nor RayCluster has a scale subresource for an HPA or KEDA to act on.
"""

from __future__ import annotations

from typing import Any, Final

import yaml

from k8s.network import network_policy, ports
from k8s.objects import HEAD, Object, container_security, selector
from k8s.patches import Key, key_of
from k8s.sizing import Sizing
from k8s.yaml_text import dump

POLICY: Final = "serving.deployments.serve_policy:QueueDelayPolicy"
"""What Serve imports into its controller; its kwargs are `ScalingSettings` of serving/deployments/autoscaling.py."""
IDLE_S: Final = 300  # a pod without work stays so long, for the next replica


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    service = objects["ray.io/v1", "RayService", spec.name]["spec"]
    cluster = service["rayClusterConfig"]
    cluster["enableInTreeAutoscaling"] = True
    cluster["autoscalerOptions"] = {
        "idleTimeoutSeconds": IDLE_S,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"limits": {"memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "1Gi"}},
        "securityContext": container_security(),
        "upscalingMode": "Default",
        "version": "v2",
        "volumeMounts": [{"mountPath": "/tmp", "name": "tmp"}],
    }
    # Its sidecar asks the API server for pods; KubeRay binds a Role for this to the head's account.
    cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] = True
    for group in cluster["workerGroupSpecs"]:
        if group["groupName"] == "workers":
            group["idleTimeoutSeconds"] = IDLE_S
    document = yaml.safe_load(service["serveConfigV2"])
    [replica] = document["applications"][1]["deployments"]
    del replica["num_replicas"]
    replica["autoscaling_config"] = autoscaling_config(sizing)
    service["serveConfigV2"] = dump(document)
    policy = api_server_policy(sizing)
    objects[key_of(policy)] = policy


def autoscaling_config(sizing: Sizing) -> dict[str, Any]:
    """Serve's delays are off: the policy has its own, and decides within metrics_interval_s + look_back_period_s."""
    engine = sizing.spec.engine
    return {
        "min_replicas": engine.min_replicas,
        "max_replicas": engine.max_replicas,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 5.0,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {
            "policy_function": POLICY,
            "policy_kwargs": {"rows_per_replica": sizing.num_rows, "start_s": round(sizing.load_s, 1)},
        },
    }


def api_server_policy(sizing: Sizing) -> Object:
    """The head alone reaches the API server."""
    spec = sizing.spec
    to = [{"ipBlock": {"cidr": spec.cluster.api_server_cidr}}]
    head = {"matchLabels": selector(spec, HEAD)}
    return network_policy(spec, "api-server", head, egress=[{"ports": ports(443, 6443), "to": to}])
