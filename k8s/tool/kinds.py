"""The kinds that the tool reads and writes, and where the API server keeps them.

A table, not discovery: it needs no right and no round trip, and a kind that a cluster lacks is a 404 by name.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from k8s.objects import Object


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object."""

    name: str
    api_version: str
    plural: str
    is_namespaced: bool = True

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Of a collection, an object or a part of one."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        place = f"/namespaces/{namespace}" if self.is_namespaced and namespace else ""
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{root}{place}/{self.plural}{tail}"

    @property
    def resource(self) -> str:
        """As a Role names it: pods, rayservices.ray.io."""
        group = self.api_version.rpartition("/")[0]
        return f"{self.plural}.{group}" if group else self.plural


NAMESPACE: Final = Kind("Namespace", "v1", "namespaces", False)
NODE: Final = Kind("Node", "v1", "nodes", False)
POD: Final = Kind("Pod", "v1", "pods")
EVENT: Final = Kind("Event", "v1", "events")
SECRET: Final = Kind("Secret", "v1", "secrets")
CONFIG_MAP: Final = Kind("ConfigMap", "v1", "configmaps")
SERVICE: Final = Kind("Service", "v1", "services")
SERVICE_ACCOUNT: Final = Kind("ServiceAccount", "v1", "serviceaccounts")
CLAIM_TEMPLATE: Final = Kind("ResourceClaimTemplate", "resource.k8s.io/v1", "resourceclaimtemplates")
CLAIM: Final = Kind("PersistentVolumeClaim", "v1", "persistentvolumeclaims")
QUOTA: Final = Kind("ResourceQuota", "v1", "resourcequotas")
LIMITS: Final = Kind("LimitRange", "v1", "limitranges")
DEPLOYMENT: Final = Kind("Deployment", "apps/v1", "deployments")
DAEMON_SET: Final = Kind("DaemonSet", "apps/v1", "daemonsets")
JOB: Final = Kind("Job", "batch/v1", "jobs")
AUTOSCALER: Final = Kind("HorizontalPodAutoscaler", "autoscaling/v2", "horizontalpodautoscalers")
BUDGET: Final = Kind("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets")
NETWORK_POLICY: Final = Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
PRIORITY_CLASS: Final = Kind("PriorityClass", "scheduling.k8s.io/v1", "priorityclasses", False)
STORAGE_CLASS: Final = Kind("StorageClass", "storage.k8s.io/v1", "storageclasses", False)
CLUSTER_ROLE: Final = Kind("ClusterRole", "rbac.authorization.k8s.io/v1", "clusterroles", False)
CLUSTER_ROLE_BINDING: Final = Kind("ClusterRoleBinding", "rbac.authorization.k8s.io/v1", "clusterrolebindings", False)
ENDPOINT_SLICE: Final = Kind("EndpointSlice", "discovery.k8s.io/v1", "endpointslices")
CRD: Final = Kind("CustomResourceDefinition", "apiextensions.k8s.io/v1", "customresourcedefinitions", False)
API_SERVICE: Final = Kind("APIService", "apiregistration.k8s.io/v1", "apiservices", False)
RAY_SERVICE: Final = Kind("RayService", "ray.io/v1", "rayservices")
RAY_CLUSTER: Final = Kind("RayCluster", "ray.io/v1", "rayclusters")
SCALED_OBJECT: Final = Kind("ScaledObject", "keda.sh/v1alpha1", "scaledobjects")
GATEWAY: Final = Kind("Gateway", "gateway.networking.k8s.io/v1", "gateways")
HTTP_ROUTE: Final = Kind("HTTPRoute", "gateway.networking.k8s.io/v1", "httproutes")
SERVICE_MONITOR: Final = Kind("ServiceMonitor", "monitoring.coreos.com/v1", "servicemonitors")
POD_MONITOR: Final = Kind("PodMonitor", "monitoring.coreos.com/v1", "podmonitors")
PROMETHEUS_RULE: Final = Kind("PrometheusRule", "monitoring.coreos.com/v1", "prometheusrules")

KINDS: Final = {(kind.api_version, kind.name): kind for kind in list(globals().values()) if isinstance(kind, Kind)}
"""(apiVersion, kind) -> Kind, of everything that is rendered and more."""


def kind_of(thing: Object) -> Kind:
    """Raises KeyError for a kind that nobody put into the table."""
    return KINDS[thing["apiVersion"], thing["kind"]]


def title(thing: Object) -> str:
    """ "RayService argosy": how people are told of an object."""
    return f"{thing['kind']} {thing['metadata']['name']}"
