"""Component gcs-rocksdb: the head writes what it knows to a volume, so that a new head goes on where the old one ended.

Workers, replicas and streams outlive the head meanwhile; without it a new head begins a new cluster.
"""

from __future__ import annotations

from typing import Any

from k8s.objects import Object
from k8s.patches import Key
from k8s.sizing import Sizing


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    # KubeRay makes the claim, mounts it into the head and tells Ray; it must reach every node a head may start on.
    storage: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "deletionPolicy": "DeleteWithCluster",
        "size": "10Gi",
    }
    if spec.cluster.storage_class:
        storage["storageClassName"] = spec.cluster.storage_class
    cluster = objects["ray.io/v1", "RayService", spec.name]["spec"]["rayClusterConfig"]
    cluster["gcsFaultToleranceOptions"] = {"backend": "rocksdb", "storage": storage}
