"""All objects of one deployment, from its spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from k8s import engine, gateway, monitoring, policy
from k8s.objects import Object
from k8s.patches import Key, key_of, keyed
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

COMPONENTS: Final[dict[str, Alteration]] = {}


def objects_by_part(spec: ServingSpec) -> dict[str, list[Object]]:
    """Folder -> objects, without any component's. Raises SpecError."""
    sizing = Sizing(spec)
    return {part: make(sizing) for part, make in PARTS.items()}


def objects(spec: ServingSpec) -> dict[Key, Object]:
    """Everything that stands on the cluster: what `kubectl kustomize` prints for the spec's overlay.

    Raises SpecError when the spec's numbers do not fit each other.
    """
    found = keyed(thing for things in objects_by_part(spec).values() for thing in things)
    for name in spec.components:
        COMPONENTS[name](Sizing(spec), found)
    return dict(sorted(found.items()))


__all__ = ["COMPONENTS", "PARTS", "Alteration", "key_of", "objects", "objects_by_part"]
