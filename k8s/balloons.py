"""Component balloons: pods of the lowest priority that hold nodes for the next replica, and leave at once for it.

They run the engine's image, so that it is on the node before a replica needs it.
"""

from __future__ import annotations

import copy

from k8s.objects import (
    BALLOON,
    PULL_POLICY,
    Object,
    container_security,
    labels,
    metadata,
    name_of,
    pod,
    selector,
    service_account,
)
from k8s.patches import Key, key_of
from k8s.sizing import Sizing


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    for thing in (service_account(spec, name_of(spec, "balloon"), BALLOON), _deployment(sizing, objects)):
        objects[key_of(thing)] = thing


def _deployment(sizing: Sizing, objects: dict[Key, Object]) -> Object:
    spec = sizing.spec
    cluster = objects["ray.io/v1", "RayService", spec.name]["spec"]["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    placed = {key: copy.deepcopy(worker[key]) for key in ("affinity", "nodeSelector", "tolerations") if key in worker}
    container = {
        "name": "balloon",
        "image": spec.images.engine,
        "imagePullPolicy": PULL_POLICY,
        "command": ["sleep", "infinity"],
        "resources": copy.deepcopy(worker["containers"][0]["resources"]),  # exactly what it holds the place of
        "securityContext": container_security(),
    }
    template = pod(
        spec,
        service_account=name_of(spec, "balloon"),
        priority="balloon",
        grace_s=0,
        containers=[container],
        preemptionPolicy="Never",
        **placed,
    )
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(spec, name_of(spec, "balloon"), BALLOON),
        "spec": {
            "replicas": spec.num_balloons * sizing.hosts_per_replica,
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": selector(spec, BALLOON)},
            "strategy": {"type": "Recreate"},
            "template": {"metadata": {"labels": labels(spec, BALLOON)}, "spec": template},
        },
    }
