"""The order in which objects are applied: what allows and limits first, what serves clients last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from k8s.objects import DIRECTORY, GATEWAY, HEAD, WEIGHTS, WORKER, Object

POLICY: Final = "policy"
CONFIG: Final = "config"
ENGINE: Final = "engine"
GATEWAYS: Final = "gateway"
REST: Final = "rest"
WAVES: Final = (POLICY, CONFIG, ENGINE, GATEWAYS, REST)

_POLICY_KINDS: Final = (
    "Namespace",
    "PriorityClass",
    "ResourceQuota",
    "LimitRange",
    "ClusterRole",
    "ClusterRoleBinding",
    "ServiceAccount",
    "NetworkPolicy",
)
_CONFIG_KINDS: Final = ("ConfigMap", "Secret", "PersistentVolumeClaim", "ResourceClaimTemplate")
_GATEWAY_KINDS: Final = (
    "Deployment",
    "Service",
    "HorizontalPodAutoscaler",
    "ScaledObject",
    "PodDisruptionBudget",
    "Gateway",
    "HTTPRoute",
)


def wave_of(thing: Object) -> str:
    """REST holds what nobody waits for: monitoring, balloons, health of GPUs, load tests."""
    kind = thing["kind"]
    component = (thing["metadata"].get("labels") or {}).get("app.kubernetes.io/component", "")
    if kind in _POLICY_KINDS:
        return POLICY
    if kind in _CONFIG_KINDS or (kind == "Job" and component == WEIGHTS):
        return CONFIG
    if kind == "RayService" or (kind == "PodDisruptionBudget" and component in (HEAD, WORKER, DIRECTORY)):
        return ENGINE
    if component == GATEWAY and kind in _GATEWAY_KINDS:
        return GATEWAYS
    return REST


def waves(things: Iterable[Object]) -> list[tuple[str, list[Object]]]:
    """(wave, its objects in the order of the kinds above), in order; empty waves are left out."""
    found: dict[str, list[Object]] = {wave: [] for wave in WAVES}
    for thing in things:
        found[wave_of(thing)].append(thing)
    for group in found.values():
        group.sort(key=lambda thing: _POLICY_KINDS.index(thing["kind"]) if thing["kind"] in _POLICY_KINDS else 99)
    return [(wave, group) for wave, group in found.items() if group]
