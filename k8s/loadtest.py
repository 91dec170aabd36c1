"""Component loadtest: `argosy loadtest` over several pods: a master that reports, workers that send.

Both wait: a Job that is suspended and a Deployment without pods. `kubectl patch` and `kubectl scale` begin a run.
"""

from __future__ import annotations

from k8s.network import network_policy, ports
from k8s.objects import (
    GATEWAY,
    GATEWAY_PORT,
    LOADTEST,
    LOADTEST_PORTS,
    PULL_POLICY,
    Object,
    container_security,
    labels,
    metadata,
    name_of,
    pod,
    scratch_volume,
    selector,
    service_account,
)
from k8s.patches import Key, key_of
from k8s.sizing import Sizing

NUM_WORKERS = 4
WORKER = "loadtest-worker"


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    master, worker = ({"podSelector": {"matchLabels": selector(spec, kind)}} for kind in (LOADTEST, WORKER))
    gateway = {"podSelector": {"matchLabels": selector(spec, GATEWAY)}}
    both = {
        "matchExpressions": [
            {"key": "app.kubernetes.io/component", "operator": "In", "values": sorted((LOADTEST, WORKER))}
        ],
        "matchLabels": {"app.kubernetes.io/instance": spec.name},
    }
    for thing in (
        service_account(spec, name_of(spec, LOADTEST), LOADTEST),
        _service(sizing),
        _master(sizing),
        _workers(sizing),
        network_policy(
            spec,
            "loadtest",
            both,
            ingress=[{"from": [worker], "ports": ports(LOADTEST_PORTS[0])}],
            egress=[
                {"ports": ports(GATEWAY_PORT), "to": [gateway]},
                {"ports": ports(LOADTEST_PORTS[0]), "to": [master]},
            ],
        ),
        network_policy(
            spec,
            "gateway-loadtest",
            gateway["podSelector"],
            ingress=[{"from": [master, worker], "ports": [{"port": "http", "protocol": "TCP"}]}],
        ),
    ):
        objects[key_of(thing)] = thing


def _container(sizing: Sizing, arguments: list[str], memory: str) -> Object:
    spec = sizing.spec
    return {
        "name": "loadtest",
        "image": spec.images.loadtest,
        "imagePullPolicy": PULL_POLICY,
        "args": ["loadtest", *arguments],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"limits": {"memory": memory}, "requests": {"cpu": "1", "memory": memory}},
        "securityContext": container_security(),
        "volumeMounts": [{"mountPath": "/tmp", "name": "tmp"}],
    }


def _pod(sizing: Sizing, container: Object, **more: object) -> Object:
    spec = sizing.spec
    return pod(
        spec,
        service_account=name_of(spec, LOADTEST),
        priority="batch",
        grace_s=30,
        containers=[container],
        volumes=[scratch_volume("tmp", "4Gi")],
        **more,
    )


def _master(sizing: Sizing) -> Object:
    spec = sizing.spec
    arguments = [
        "--master",
        "--master-host=0.0.0.0",
        f"--master-port={LOADTEST_PORTS[0]}",
        f"--workers={NUM_WORKERS}",
        f"--target=http://{name_of(spec, 'gateway')}",
        "--arrivals=poisson:5",
        "--duration=300",
        "--out=/tmp/loadtest-out",
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(spec, name_of(spec, LOADTEST), LOADTEST),
        "spec": {
            "activeDeadlineSeconds": 3600,
            "backoffLimit": 0,
            "suspend": True,
            "template": {
                "metadata": {"labels": labels(spec, LOADTEST)},
                "spec": _pod(sizing, _container(sizing, arguments, "2Gi"), restartPolicy="Never"),
            },
        },
    }


def _workers(sizing: Sizing) -> Object:
    spec = sizing.spec
    arguments = [
        "--worker",
        f"--master-host={name_of(spec, LOADTEST)}",
        f"--master-port={LOADTEST_PORTS[0]}",
        f"--target=http://{name_of(spec, 'gateway')}",
    ]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(spec, name_of(spec, WORKER), WORKER),
        "spec": {
            "replicas": 0,
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": selector(spec, WORKER)},
            "template": {
                "metadata": {"labels": labels(spec, WORKER)},
                "spec": _pod(sizing, _container(sizing, arguments, "2Gi")),
            },
        },
    }


def _service(sizing: Sizing) -> Object:
    """Headless: workers ask for the master by name."""
    spec = sizing.spec
    port = {"name": "locust", "port": LOADTEST_PORTS[0], "protocol": "TCP", "targetPort": LOADTEST_PORTS[0]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(spec, name_of(spec, LOADTEST), LOADTEST),
        "spec": {
            "clusterIP": "None",
            "ports": [port],
            "publishNotReadyAddresses": True,
            "selector": selector(spec, LOADTEST),
            "type": "ClusterIP",
        },
    }
