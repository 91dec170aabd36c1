"""What the checks look at: read once, with reading rights alone; what may not be read is absent and says why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from k8s.objects import Object, engine_secret
from k8s.sizing import Sizing
from k8s.spec import ServingSpec
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError, DeadlineError
from k8s.tool.fleet import READ, Fleet, read_fleet
from k8s.tool.kinds import (
    API_SERVICE,
    CRD,
    DEPLOYMENT,
    ENDPOINT_SLICE,
    NAMESPACE,
    NETWORK_POLICY,
    NODE,
    POD,
    PRIORITY_CLASS,
    SECRET,
    STORAGE_CLASS,
    Kind,
)
from k8s.tool.revisions import Revision, read_revisions
from k8s.tool.specs import objects_of

NODES = "nodes"
CLASSES = "priorityclasses"
STORAGE = "storageclasses"
CRDS = "customresourcedefinitions"
APIS = "apiservices"
NAMESPACES = "namespaces"
POLICIES = "networkpolicies"
ENDPOINTS = "endpointslices"
DNS = "DNS's pods"
OPERATOR = "KubeRay's deployment"
SECRETS = "secrets"
REVISIONS = "revisions"
VERSION = "the server's version"
REPLICAS = "replicas"

_LISTS: tuple[tuple[str, Kind, bool], ...] = (
    (NODES, NODE, False),
    (CLASSES, PRIORITY_CLASS, False),
    (STORAGE, STORAGE_CLASS, False),
    (CRDS, CRD, False),
    (APIS, API_SERVICE, False),
    (NAMESPACES, NAMESPACE, False),
    (POLICIES, NETWORK_POLICY, True),
    (ENDPOINTS, ENDPOINT_SLICE, True),
)


@dataclasses.dataclass(slots=True, weakref_slot=True)
class Facts:
    """unknown: the name of a fact -> what reading it needs."""

    spec: ServingSpec
    fleet: Fleet
    lists: dict[str, list[Object]]
    secrets: dict[str, Object | None]
    revisions: list[Revision]
    version: str
    unknown: dict[str, str]

    @property
    def sizing(self) -> Sizing:
        return Sizing(self.spec)

    @property
    def namespace(self) -> Object | None:
        return next((n for n in self.lists[NAMESPACES] if n["metadata"]["name"] == self.spec.namespace), None)

    @property
    def worker_template(self) -> Object:
        """The pod that replicas ask for: as it is live, else as the spec renders it."""
        return _template(self.fleet.service or _rendered_service(self.spec), "workers")

    @property
    def head_template(self) -> Object:
        service = self.fleet.service or _rendered_service(self.spec)
        return service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]  # type: ignore[no-any-return]


def read_facts(cluster: Cluster, spec: ServingSpec) -> Facts:
    """Raises ApiError for what is neither forbidden nor absent, DeadlineError when nothing answers at all."""
    unknown: dict[str, str] = {}
    version = ""
    try:
        version = cluster.version()
    except ApiError as error:
        unknown[VERSION] = str(error)
    fleet = read_fleet(cluster, spec.name, spec.namespace, kinds=READ)
    unknown |= fleet.unknown
    lists: dict[str, list[Object]] = {}
    for name, kind, is_local in _LISTS:
        lists[name] = _list(cluster, kind, spec.namespace if is_local else "", "", name, unknown)
    lists[DNS] = _list(cluster, POD, "kube-system", "k8s-app=kube-dns", DNS, unknown)
    operator = "app.kubernetes.io/name=kuberay-operator"
    lists[OPERATOR] = _list(cluster, DEPLOYMENT, spec.cluster.operator_namespace, operator, OPERATOR, unknown)
    secrets = _read_secrets(cluster, spec, unknown)
    revisions: list[Revision] = []
    try:
        revisions = read_revisions(cluster, spec.name, spec.namespace)
    except ApiError as error:
        if not error.is_forbidden:
            raise
        unknown[REVISIONS] = "needs list on secrets"
    return Facts(spec, fleet, lists, secrets, revisions, version, unknown)


def _list(
    cluster: Cluster, kind: Kind, namespace: str, labels: str, name: str, unknown: dict[str, str]
) -> list[Object]:
    try:
        return cluster.select(kind, namespace, labels=labels, is_cached=kind is NODE).items
    except ApiError as error:
        if not (error.is_forbidden or error.is_missing):
            raise
        where = f" in {namespace}" if namespace else ""
        unknown[name] = (
            f"needs list on {kind.resource}{where}" if error.is_forbidden else f"there is no {kind.resource}"
        )
    except DeadlineError as error:
        unknown[name] = str(error)
    return []


def _read_secrets(cluster: Cluster, spec: ServingSpec, unknown: dict[str, str]) -> dict[str, Object | None]:
    names: Sequence[str] = [engine_secret(spec), *([spec.images.pull_secret] if spec.images.pull_secret else [])]
    found: dict[str, Object | None] = {}
    for name in names:
        try:
            found[name] = cluster.get(SECRET, name, spec.namespace)
        except ApiError as error:
            if not error.is_forbidden:
                raise
            unknown[SECRETS] = "needs get on secrets"
    return found


@functools.cache
def _rendered_service(spec: ServingSpec) -> Object:
    return next(thing for thing in objects_of(spec) if thing["kind"] == "RayService")


def _template(service: Object, group: str) -> Object:
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    found = next((g for g in groups if g["groupName"] == group), groups[0])
    return found["template"]["spec"]  # type: ignore[no-any-return]
