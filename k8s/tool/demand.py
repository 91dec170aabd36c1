"""Pods, GPUs and quota that a change of the engine needs while it is made, against what there is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from k8s.dra import CLAIMS_QUOTA, UNCOUNTED, devices_quota
from k8s.objects import PRIORITIES, WORKER, Object
from k8s.sizing import Sizing
from k8s.spec import ServingSpec
from k8s.tool import upgrade
from k8s.tool.capacity import Cause, Fit, place, read_rooms
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError
from k8s.tool.kinds import POD, QUOTA
from k8s.tool.quantities import number, pod_requests, shown
from k8s.tool.upgrade import Upgrade


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """GPUs and replicas of the engine before, while and after a change. None: not known, and `unknown` says why."""

    gpus_now: int | None
    gpus_during: int | None
    gpus_after: int
    more_replicas: int  # that must find a place before the old ones leave it
    fit: Fit | None
    unknown: str = ""
    quota: tuple[str, ...] = ()  # what no quota allows

    @property
    def refusals(self) -> list[str]:
        found = list(self.quota)
        if self.fit is not None and not self.fit.is_whole:
            lacking = "; ".join(f"node {name} {why}" for name, why in sorted(self.fit.lacking.items())[:5])
            found.append(
                f"{self.fit.asked} more replicas must run during the change, and {self.fit.placed} fit: "
                + (lacking or "there is no node")
            )
        return found


def worker_template(service: Object) -> Object:
    """The pod of the worker group that replicas run in."""
    return upgrade.groups(service["spec"]["rayClusterConfig"])["workers"]["template"]["spec"]  # type: ignore[no-any-return]


def read_demand(
    cluster: Cluster, spec: ServingSpec, service: Object, change: Upgrade, quotas: Sequence[Object]
) -> Demand:
    """quotas: ResourceQuotas as they will be, ours among them. Raises ApiError, but not for what may not be read."""
    sizing = Sizing(spec)
    hosts, gpus = sizing.hosts_per_replica, sizing.gpus_per_pod
    after = spec.engine.min_replicas * hosts * gpus
    selector = f"app.kubernetes.io/instance={spec.name},app.kubernetes.io/component={WORKER}"
    try:
        pods = cluster.select(POD, spec.namespace, labels=selector).items
    except ApiError as error:
        if not error.is_forbidden:
            raise
        return Demand(None, None, after, 0, None, f"needs list on pods in {spec.namespace}")
    living = [pod for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    resource = spec.cluster.gpu_resource
    current = math.ceil(len(living) / hosts)
    more = _more_replicas(sizing, change, current)
    if spec.has("dra") or any(pod["spec"].get("resourceClaims") for pod in living):
        claims = {devices_quota(spec): gpus, CLAIMS_QUOTA: 1} if spec.has("dra") else {}
        refused = _beyond_quota(quotas, worker_template(service), more * hosts, resource, claims)
        return Demand(None, None, after, more, None, UNCOUNTED, refused)
    now = round(sum(pod_requests(pod["spec"]).get(resource, 0.0) for pod in living))
    during = now + more * hosts * gpus
    if more == 0:
        return Demand(now, during, after, 0, None)
    template = worker_template(service)
    found = read_rooms(cluster, priority=PRIORITIES["serving"], is_ours=lambda _: False)
    refused = _beyond_quota(quotas, template, more * hosts, resource)
    if isinstance(found, Cause):
        return Demand(now, during, after, more, None, found.text, refused)
    return Demand(now, during, after, more, place(found, template, units=more, pods_per_unit=hosts), "", refused)


def _more_replicas(sizing: Sizing, change: Upgrade, current: int) -> int:
    engine = sizing.spec.engine
    if change.kind in (upgrade.CREATE, upgrade.NEW_CLUSTER):
        return engine.min_replicas if change.kind == upgrade.CREATE else max(engine.min_replicas, 1 if current else 0)
    if change.kind == upgrade.INCREMENTAL:
        return math.ceil(engine.min_replicas * change.surge_percent / 100)
    if change.kind == upgrade.RESIZE:
        return max(0, engine.min_replicas - current)
    if change.kind == upgrade.IN_PLACE:
        grows = max(0, engine.min_replicas - current)
        surges = bool(change.restarts) and sizing.max_surge_percent > 0 and current > 0
        return max(grows, min(1, sizing.max_groups - current) if surges else 0)
    return 0


def _beyond_quota(
    quotas: Sequence[Object],
    template: Object,
    num_pods: int,
    resource: str,
    claims: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, ...]:
    """claims: what one pod's claims take, by its name in a quota."""
    if num_pods == 0:
        return ()
    asked = {name: amount * num_pods for name, amount in pod_requests(template).items()}
    wanted = {"pods": asked["pods"], f"requests.{resource}": asked.get(resource, 0.0)}
    wanted |= {name: float(amount * num_pods) for name, amount in claims.items()}
    for name in ("cpu", "memory"):
        wanted[name] = wanted[f"requests.{name}"] = asked.get(name, 0.0)
    found = []
    for quota in quotas:
        used = (quota.get("status") or {}).get("used") or {}
        for name, hard in (quota["spec"].get("hard") or {}).items():
            left = (number(hard) or 0.0) - (number(used.get(name, 0)) or 0.0)
            if wanted.get(name, 0.0) > left + 1e-9:
                what = name.removeprefix("requests.")
                found.append(
                    f"ResourceQuota {quota['metadata']['name']}: {shown(what, wanted[name])} more are needed of "
                    f"{name} {hard}, of which {shown(what, max(0.0, left))} are left"
                )
    return tuple(found)


def live_quotas(cluster: Cluster, namespace: str, wanted: Sequence[Object]) -> list[Object]:
    """What quotas of a namespace will say once `wanted` is applied; those that may not be read count as absent."""
    try:
        live = {quota["metadata"]["name"]: quota for quota in cluster.select(QUOTA, namespace).items}
    except ApiError as error:
        if not error.is_forbidden:
            raise
        return []
    for thing in wanted:
        if thing["kind"] == "ResourceQuota":
            name = thing["metadata"]["name"]
            live[name] = {**thing, "status": (live.get(name) or {}).get("status") or {}}
    return list(live.values())
