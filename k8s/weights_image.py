"""Component weights-image: the model comes in an image that the kubelet mounts, and nobody fetches anything.

The image's root is a store: `/NAME/argosy.json`, as `argosy pull` writes it. Its pull is over before a container of
the pod starts, so no probe waits for it.
"""

from __future__ import annotations

from k8s.network import FETCH
from k8s.objects import PULL_POLICY, Object, name_of
from k8s.patches import Key, key_of
from k8s.settings import model_config_map
from k8s.sizing import Sizing


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    cluster = objects["ray.io/v1", "RayService", spec.name]["spec"]["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    del worker["initContainers"]
    worker["volumes"] = [
        _volume(sizing) if volume["name"] == "models" else volume
        for volume in worker["volumes"]
        if volume["name"] not in ("hub-secret", "model")
    ]
    # What only a pull needs: its way out, and its variables.
    del objects["networking.k8s.io/v1", "NetworkPolicy", name_of(spec, FETCH)]
    del objects[key_of(model_config_map(sizing))]


def _volume(sizing: Sizing) -> Object:
    """Read-only by its kind; pulled with the pod's own pull secrets."""
    return {"image": {"pullPolicy": PULL_POLICY, "reference": sizing.spec.images.weights}, "name": "models"}
