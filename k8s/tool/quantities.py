"""Kubernetes quantities as numbers, and what pods ask for in sum."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from k8s.amounts import GI, MI
from k8s.objects import Object

_UNITS: Final = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip
_QUANTITY: Final = re.compile(r"([+-]?\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?([numkKMGTPE]i?|)")

Amounts = dict[str, float]
"""Resource -> amount: cpu in cores, memory in bytes, others in pieces."""


def number(quantity: Any) -> float | None:
    """ "500m" is 0.5, "1Gi" is 2**30; None for what is no quantity."""
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None or match.group(3) not in _UNITS:
        return None
    return float(match.group(1)) * 10.0 ** int(match.group(2) or 0) * _UNITS[match.group(3)]


def amounts(resources: Mapping[str, Any] | None) -> Amounts:
    return {name: number(quantity) or 0.0 for name, quantity in (resources or {}).items()}


def pod_requests(spec: Object) -> Amounts:
    """What the scheduler counts for a pod's spec: its containers together, or its largest init container if that is
    more, and its overhead. A limit without a request is one, as the API server would fill it in. The pod itself
    counts under `pods`."""
    running = _sum(_requests(container) for container in spec.get("containers") or [])
    for container in spec.get("initContainers") or []:
        asked = _requests(container)
        if container.get("restartPolicy") == "Always":  # a sidecar runs on
            running = _sum([running, asked])
        else:
            running = {
                name: max(running.get(name, 0.0), asked.get(name, 0.0)) for name in running.keys() | asked.keys()
            }
    return _sum([running, amounts(spec.get("overhead")), {"pods": 1.0}])


def _requests(container: Object) -> Amounts:
    resources = container.get("resources") or {}
    return amounts({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def _sum(parts: Iterable[Amounts]) -> Amounts:
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def shown(resource: str, amount: float) -> str:
    """ "2 GPUs", "12.0 GiB", "1.5 CPUs": for people."""
    if resource in ("memory", "ephemeral-storage") or resource.startswith("hugepages"):
        return f"{amount / GI:.1f} GiB" if amount >= GI else f"{amount / MI:.0f} MiB"
    what = {"cpu": "CPU", "pods": "pod"}.get(resource) or ("GPU" if resource.endswith("/gpu") else resource)
    return f"{amount:g} {what}{'' if amount == 1 or '/' in what else 's'}"
