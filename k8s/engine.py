"""The engine on Kubernetes: a KubeRay RayService with a head that computes nothing and one group of workers."""

from __future__ import annotations

import math
from typing import Final

from k8s import serve_config
from k8s.amounts import cpus, quantity
from k8s.objects import (
    AGENT_PORT,
    DASHBOARD_PORT,
    DIRECTORY,
    ENGINE_PORTS,
    HEAD,
    MODELS_PATH,
    PULL_POLICY,
    RAY_METRICS_PORT,
    SECRET_PATH,
    SERVE_PORT,
    WORKER,
    Object,
    container_security,
    engine_secret,
    gpu_tolerations,
    http_probe,
    labels,
    memory_volume,
    metadata,
    name_of,
    off_gpu_nodes,
    pod,
    scratch_volume,
    selector,
    service_account,
    spread,
)
from k8s.settings import model_config_map
from k8s.sizing import OBJECT_STORE_BYTES, STARTUP_PERIOD_S, Sizing
from k8s.weights import fetch_container, fetch_volumes
from k8s.yaml_text import dump

RAY_VERSION: Final = "2.60.0"
HEALTH_PATH: Final = "/api/local_raylet_healthz"  # of Ray's node agent; asks for no token
GROUP: Final = "workers"

ENVIRONMENT: Final = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.05",  # of the look-back: load read four times a second
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a sick replica is killed, never drained (C19b)
    "RAY_USAGE_STATS_ENABLED": "0",
    # With the default of 60 s every process ends itself a minute after GCS did.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
}


def objects(sizing: Sizing) -> list[Object]:
    """ServiceAccounts, the model's ConfigMap, RayService, PodDisruptionBudgets of head and workers."""
    spec = sizing.spec
    return [
        service_account(spec, name_of(spec, "head"), HEAD),
        service_account(spec, name_of(spec, "worker"), WORKER),
        model_config_map(sizing),
        _ray_service(sizing),
        # One head: a budget can let it go or block its node for ever.
        _disruption_budget(sizing, HEAD, "head", 0),
        # A gang lives and dies whole: the hosts of one replica may leave together.
        _disruption_budget(sizing, WORKER, "worker", max(0, spec.engine.min_replicas - 1) * sizing.hosts_per_replica),
    ]


def _ray_service(sizing: Sizing) -> Object:
    spec = sizing.spec
    upgrade = "NewCluster" if spec.engine.upgrade == "new-cluster" else "None"
    groups = [_worker_group(sizing)]
    if serve_config.has_directory_group(sizing):
        groups.append(_directory_group(sizing))
    cluster: Object = {
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": False,
        "headGroupSpec": _head_group(sizing),
        "rayVersion": RAY_VERSION,
        "workerGroupSpecs": groups,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata(spec, spec.name, "engine"),
        "spec": {
            "excludeHeadPodFromServeSvc": True,
            "rayClusterConfig": cluster,
            "rayClusterDeletionDelaySeconds": sizing.deletion_delay_s,
            "serveConfigV2": dump(serve_config.document(sizing)),
            "upgradeStrategy": {"type": upgrade},
        },
    }


# --- pods ---------------------------------------------------------------------------------------


def _environment(sizing: Sizing) -> list[Object]:
    values = ENVIRONMENT | {
        "HOME": "/tmp",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(sizing.ray_drain_s),
    }
    return [{"name": name, "value": values[name]} for name in sorted(values)]


def _ray_container(sizing: Sizing, name: str, *, cpu: float, memory: str, startup_failures: int) -> Object:
    """A Ray node's own health decides over its pod, never the model's: loading is not sickness, and a worker
    without a replica is Ready. A replica's readiness is the directory's to tell."""
    spec = sizing.spec
    health = {"port": AGENT_PORT, "timeout_s": 5}
    return {
        "name": name,
        "image": spec.images.engine,
        "imagePullPolicy": PULL_POLICY,
        "env": _environment(sizing),
        "livenessProbe": http_probe(HEALTH_PATH, AGENT_PORT, period_s=10, timeout_s=5, failures=6),
        "readinessProbe": http_probe("/api/healthz", **health, period_s=5, failures=2),
        "resources": {"limits": {"memory": memory}, "requests": {"cpu": cpus(cpu), "memory": memory}},
        "securityContext": container_security(),
        "startupProbe": http_probe(HEALTH_PATH, **health, period_s=STARTUP_PERIOD_S, failures=startup_failures),
        "volumeMounts": [
            {"mountPath": "/dev/shm", "name": "shm"},
            {"mountPath": "/tmp", "name": "tmp"},
            # The directory may be on any of them, and hears from gateways only what is signed.
            {"mountPath": SECRET_PATH, "name": "engine-secret", "readOnly": True},
        ],
    }


def _volumes(sizing: Sizing, *, shm_bytes: int, tmp: str) -> list[Object]:
    """What `_ray_container` mounts."""
    return [
        memory_volume("shm", quantity(shm_bytes)),
        scratch_volume("tmp", tmp),
        {"name": "engine-secret", "secret": {"defaultMode": 0o440, "secretName": engine_secret(sizing.spec)}},
    ]


def _ports(*named: tuple[str, int]) -> list[Object]:
    return [{"containerPort": port, "name": name, "protocol": "TCP"} for name, port in named]


def _head_group(sizing: Sizing) -> Object:
    spec = sizing.spec
    container = _ray_container(
        sizing, "ray-head", cpu=sizing.head_cpus, memory=quantity(sizing.head_memory_bytes), startup_failures=60
    )
    container["ports"] = _ports(
        ("gcs", 6379), ("dashboard", DASHBOARD_PORT), ("metrics", RAY_METRICS_PORT), ("serve", SERVE_PORT)
    )
    template = pod(
        spec,
        service_account=name_of(spec, "head"),
        priority="head",
        grace_s=sizing.engine_grace_s,
        affinity=off_gpu_nodes(spec),
        containers=[container],
        volumes=_volumes(sizing, shm_bytes=2 * OBJECT_STORE_BYTES, tmp="8Gi"),
    )
    return {
        # No CPU for work: nothing of ours is placed here but what asks for none.
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",
            "num-cpus": "0",
            "num-gpus": "0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "serviceType": "ClusterIP",
        "template": {"metadata": {"labels": labels(spec, HEAD)}, "spec": template},
    }


def _worker_group(sizing: Sizing) -> Object:
    spec = sizing.spec
    engine = spec.engine
    memory = quantity(sizing.worker_memory_bytes)
    container = _ray_container(
        sizing, "ray-worker", cpu=sizing.worker_cpus, memory=memory, startup_failures=sizing.startup_failures
    )
    container["ports"] = _ports(("serve", SERVE_PORT), ("metrics", RAY_METRICS_PORT), ("engine", ENGINE_PORTS[0]))
    container["volumeMounts"].append({"mountPath": MODELS_PATH, "name": "models", "readOnly": True})
    placed: Object = {"affinity": off_gpu_nodes(spec)}
    if sizing.gpus_per_pod:
        gpus = str(sizing.gpus_per_pod)
        container["resources"]["limits"][spec.cluster.gpu_resource] = gpus
        container["resources"]["requests"][spec.cluster.gpu_resource] = gpus
        product = {"nvidia.com/gpu.product": spec.cluster.gpu_product} if spec.cluster.gpu_product else {}
        placed = {
            "nodeSelector": {spec.cluster.gpu_node_label: "true", **product},
            "tolerations": gpu_tolerations(spec),
        }
    template = pod(
        spec,
        service_account=name_of(spec, "worker"),
        priority="serving",
        grace_s=sizing.engine_grace_s,
        containers=[container],
        initContainers=[fetch_container(sizing)],
        topologySpreadConstraints=[
            spread(spec, WORKER, "kubernetes.io/hostname", is_required=False, generation="ray.io/cluster")
        ],
        volumes=[
            *_volumes(sizing, shm_bytes=sizing.shm_bytes, tmp="16Gi"),
            scratch_volume("models", quantity(sizing.weights_volume_bytes)),
            *fetch_volumes(sizing),
        ],
        **placed,
    )
    return {
        "groupName": GROUP,
        "maxReplicas": sizing.max_groups,
        "minReplicas": engine.min_replicas,
        "numOfHosts": sizing.hosts_per_replica,
        "rayStartParams": {
            "num-cpus": str(max(1, math.ceil(engine.cpus_per_rank * sizing.ranks_per_pod))),
            "num-gpus": str(sizing.gpus_per_pod),
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "replicas": engine.min_replicas,
        "template": {"metadata": {"labels": labels(spec, WORKER)}, "spec": template},
    }


def _directory_group(sizing: Sizing) -> Object:
    """Two small pods that hold the directory and Serve's proxy while the engine has none."""
    spec = sizing.spec
    container = _ray_container(sizing, "ray-worker", cpu=0.5, memory="2Gi", startup_failures=60)
    container["ports"] = _ports(("serve", SERVE_PORT), ("metrics", RAY_METRICS_PORT))
    template = pod(
        spec,
        service_account=name_of(spec, "worker"),
        priority="head",
        grace_s=sizing.engine_grace_s,
        affinity=off_gpu_nodes(spec),
        containers=[container],
        topologySpreadConstraints=[
            spread(spec, DIRECTORY, "kubernetes.io/hostname", is_required=False, generation="ray.io/cluster")
        ],
        volumes=_volumes(sizing, shm_bytes=2 * OBJECT_STORE_BYTES, tmp="4Gi"),
    )
    return {
        "groupName": "directory",
        "maxReplicas": 2,
        "minReplicas": 2,
        "numOfHosts": 1,
        "rayStartParams": {
            "num-cpus": "0",
            "num-gpus": "0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
            "resources": f"'{{\"{serve_config.DIRECTORY_RESOURCE}\": 1}}'",
        },
        "replicas": 2,
        "template": {"metadata": {"labels": labels(spec, DIRECTORY)}, "spec": template},
    }


def _disruption_budget(sizing: Sizing, component: str, suffix: str, min_available: int) -> Object:
    """A number that stays, since maxUnavailable asks a pod's owner for its scale: a RayCluster has none to tell, and
    then no pod may ever be evicted."""
    spec = sizing.spec
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(spec, name_of(spec, suffix), component),
        "spec": {
            "minAvailable": min_available,
            "selector": {"matchLabels": selector(spec, component)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
