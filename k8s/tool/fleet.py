"""One deployment as it stands: read with one list for each kind, and one page of a gateway."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from k8s.objects import GATEWAY, GATEWAY_PORT, HEAD, WORKER, Object
from k8s.tool import inside, reasons
from k8s.tool.cluster import Cluster
from k8s.tool.differences import SERVE_CONFIG
from k8s.tool.exits import ApiError, DeadlineError, ToolError
from k8s.tool.kinds import (
    AUTOSCALER,
    BUDGET,
    DEPLOYMENT,
    EVENT,
    POD,
    QUOTA,
    RAY_CLUSTER,
    RAY_SERVICE,
    SCALED_OBJECT,
    Kind,
)
from k8s.tool.upgrade import engine_deployment

COMPONENT = "app.kubernetes.io/component"
INSTANCE = "app.kubernetes.io/instance"
READ: tuple[Kind, ...] = (RAY_SERVICE, RAY_CLUSTER, POD, DEPLOYMENT, AUTOSCALER, BUDGET, QUOTA, EVENT)


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """One engine replica as a gateway sees it, with the pods of its ranks (rank 0 first)."""

    id: str
    state: str
    pods: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Requests that it works on or has queued."""
        return int(self.facts.get("num_running") or 0) + int(self.facts.get("num_waiting") or 0)


@dataclasses.dataclass(slots=True)
class Fleet:
    """unknown: kind -> why it could not be read. replicas: None when no gateway told."""

    name: str
    namespace: str
    items: dict[Kind, list[Object]]
    unknown: dict[str, str]
    replicas: list[Replica] | None = None

    @property
    def service(self) -> Object | None:
        return self.find(RAY_SERVICE, self.name)

    def find(self, kind: Kind, name: str) -> Object | None:
        return next((thing for thing in self.items.get(kind, []) if thing["metadata"]["name"] == name), None)

    def pods(self, *components: str) -> list[Object]:
        """Ours, of some components, or of all."""
        found = []
        for pod in self.items.get(POD, []):
            labels = pod["metadata"].get("labels") or {}
            if labels.get(INSTANCE) == self.name and (not components or labels.get(COMPONENT) in components):
                found.append(pod)
        return found

    @property
    def workers(self) -> list[Object]:
        return self.pods(WORKER)

    @property
    def gateways(self) -> list[Object]:
        return self.pods(GATEWAY)

    @property
    def heads(self) -> list[Object]:
        return self.pods(HEAD)

    @property
    def serve_config(self) -> Any:
        """The document of the RayService; {} where there is none that can be read."""
        text = ((self.service or {}).get("spec") or {}).get(SERVE_CONFIG, "")
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def bounds(self) -> tuple[int, int] | None:
        """(fewest, most) engine replicas that Serve is asked for; None where that is not known."""
        try:
            replica = engine_deployment(self.serve_config)
        except KeyError:
            return None
        scaling = replica.get("autoscaling_config")
        if scaling is None:
            return int(replica.get("num_replicas", 1)), int(replica.get("num_replicas", 1))
        return int(scaling.get("min_replicas", 1)), int(scaling.get("max_replicas", 1))

    @property
    def hosts_per_replica(self) -> int:
        config = ((self.service or {}).get("spec") or {}).get("rayClusterConfig") or {}
        for group in config.get("workerGroupSpecs") or []:
            if group.get("groupName") == "workers":
                return int(group.get("numOfHosts", 1))
        return 1

    def of_pod(self, name: str) -> list[Replica]:
        """Replicas with a rank in a pod."""
        return [replica for replica in self.replicas or [] if name in replica.pods]


def read_fleet(cluster: Cluster, name: str, namespace: str, *, kinds: Sequence[Kind] = READ) -> Fleet:
    """Raises DeadlineError, and ApiError for what is neither forbidden nor absent."""
    fleet = Fleet(name, namespace, {}, {})
    for kind in kinds:
        try:
            fleet.items[kind] = cluster.select(kind, namespace).items
        except ApiError as error:
            if not (error.is_forbidden or error.is_missing):
                raise
            what = f"needs list on {kind.resource}" if error.is_forbidden else f"this cluster has no {kind.resource}"
            fleet.unknown[kind.name] = what
    if POD in kinds:
        fleet.replicas = _read_replicas(cluster, fleet)
    return fleet


def read_optional(cluster: Cluster, kind: Kind, namespace: str = "") -> list[Object] | None:
    """None where the kind may not be read, or is not known to the cluster."""
    try:
        return cluster.select(kind, namespace).items
    except ApiError as error:
        if error.is_forbidden or error.is_missing:
            return None
        raise


def scaler_of_gateways(cluster: Cluster, fleet: Fleet) -> tuple[str, Object] | None:
    """(KEDA | HPA, the object) that owns the number of gateways; None where nobody does."""
    target = f"{fleet.name}-gateway"
    for scaled in read_optional(cluster, SCALED_OBJECT, fleet.namespace) or []:
        if (scaled["spec"].get("scaleTargetRef") or {}).get("name") == target:
            return "KEDA", scaled
    for autoscaler in fleet.items.get(AUTOSCALER, []):
        if autoscaler["spec"]["scaleTargetRef"]["name"] == target:
            return "HPA", autoscaler
    return None


def _read_replicas(cluster: Cluster, fleet: Fleet) -> list[Replica] | None:
    """From the first gateway that answers; two are asked at most."""
    ready = [pod for pod in fleet.gateways if reasons.is_ready(pod)]
    if not ready:
        fleet.unknown["replicas"] = "no gateway is ready to be asked"
        return None
    for pod in ready[:2]:
        name = pod["metadata"]["name"]
        try:
            said = inside.page(cluster, name, fleet.namespace, "gateway", GATEWAY_PORT, "/progressz")
            return [_replica(entry, fleet.workers) for entry in said["replicas"]]
        except (ApiError, DeadlineError) as error:
            fleet.unknown["replicas"] = f"{error}; needs get on pods/proxy or create on pods/exec"
        except (KeyError, TypeError, AttributeError) as error:
            raise ToolError(f"get /progressz of Pod {name}: an answer of another version: {error!r}") from None
    return None


def _replica(entry: Any, workers: list[Object]) -> Replica:
    names = [str(pod["metadata"]["name"]) for pod in workers]
    pods: list[str] = []
    for rank in entry.get("ranks") or []:
        # A host's name is its pod's, cut to 63 characters.
        name = next((name for name in names if name[:63] == rank.get("host")), "")
        if name and name not in pods:
            pods.append(name)
    facts = {key: value for key, value in entry.items() if key not in ("id", "state", "ranks")}
    return Replica(str(entry["id"]), str(entry["state"]), tuple(pods), facts)
