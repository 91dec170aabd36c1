"""Specs that nobody committed, with components that no overlay has; every invariant holds of them too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from k8s import render
from k8s.spec import NO_DIGEST, ServingSpec

WEIGHTS: Final = f"registry.invalid/argosy/weights@{NO_DIGEST}"


def changed(overlay: str, *added: str, without: tuple[str, ...] = ()) -> ServingSpec:
    """An overlay's spec with other components."""
    spec = render.overlay_spec(overlay)
    components = {*spec.components, *added} - set(without)
    images = dataclasses.replace(spec.images, weights=WEIGHTS)
    return dataclasses.replace(spec, components=tuple(sorted(components)), images=images)


def _scaled_by_keda() -> ServingSpec:
    small = changed("dev-cpu", "autoscale-keda")
    return dataclasses.replace(small, gateway=dataclasses.replace(small.gateway, max_replicas=3))


def _with_all_at_the_edge() -> ServingSpec:
    large = changed("prod-h100-tp8", "autoscale-keda", "gateway-api")
    cluster = dataclasses.replace(
        large.cluster,
        ingress_namespace="envoy-gateway-system",
        gateway_class="envoy",
        gateway_certificate="argosy-tls",
        hostname="llm.example.com",
    )
    return dataclasses.replace(large, cluster=cluster)


OPTIONAL: Final[dict[str, Callable[[], ServingSpec]]] = {
    "edge-route": lambda: changed("dev-cpu", "gateway-api"),
    "edge-keda": _scaled_by_keda,
    "edge-all": _with_all_at_the_edge,
    "weights-image": lambda: changed("prod-h100-tp8", "weights-image", without=("weights-pvc",)),
    "weights-image-on-a-cpu": lambda: changed("dev-cpu", "weights-image"),
    "dra": lambda: changed("prod-multihost-tp8-pp2", "dra", without=("balloons", "gpu-health")),
    "dra-on-one-gpu": lambda: changed("single-gpu", "dra"),
    "dra-and-weights-image": lambda: changed(
        "prod-scale-to-zero", "dra", "weights-image", without=("gpu-health", "weights-pvc")
    ),
}
"""At a deployment's edge and in its engine: a component alone on a small deployment, and several on a large one."""
