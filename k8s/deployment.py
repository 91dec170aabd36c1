"""All objects of one deployment, from its spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from k8s import (
    autoscale,
    autoscale_keda,
    balloons,
    dra,
    engine,
    gateway,
    gateway_api,
    gcs,
    gpu_health,
    loadtest,
    monitoring,
    policy,
    weights_image,
    weights_pvc,
)
from k8s.objects import Object
from k8s.patches import Key, keyed
from k8s.sizing import Sizing
from k8s.spec import ServingSpec

Alteration = Callable[[Sizing, dict[Key, Object]], None]
"""A component: changes the objects of a deployment in place and adds its own."""

PARTS: Final = {
    "policy": policy.objects,
    "gateway": gateway.objects,
    "engine": engine.objects,
    "monitoring": monitoring.objects,
}
"""Folder of k8s/base -> what stands in it."""

COMPONENTS: Final[dict[str, Alteration]] = {
    "autoscale-ray": autoscale.alter,
    "gcs-rocksdb": gcs.alter,
    "weights-image": weights_image.alter,
    "weights-pvc": weights_pvc.alter,
    "dra": dra.alter,
    "balloons": balloons.alter,  # copies what a worker asks for
    "gpu-health": gpu_health.alter,
    "loadtest": loadtest.alter,
    "gateway-api": gateway_api.alter,
    "autoscale-keda": autoscale_keda.alter,
}
"""In the order in which they are applied."""


def objects_by_part(spec: ServingSpec) -> dict[str, list[Object]]:
    """Folder -> objects, without any component's. Raises SpecError."""
    sizing = Sizing(spec)
    return {part: make(sizing) for part, make in PARTS.items()}


def objects(spec: ServingSpec) -> dict[Key, Object]:
    """Everything that stands on the cluster: what `kubectl kustomize` prints for the spec's overlay.

    Raises SpecError when the spec's numbers do not fit each other.
    """
    found = keyed(thing for things in objects_by_part(spec).values() for thing in things)
    for name, alter in COMPONENTS.items():
        if spec.has(name):
            alter(Sizing(spec), found)
    return dict(sorted(found.items()))
