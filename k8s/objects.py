"""What objects have in common: names, labels, and the parts of a pod that Pod Security asks for.

Objects are plain dicts in the API's own words. Nothing here knows a deployment.
"""

from __future__ import annotations

from typing import Any, Final

from k8s.spec import ServingSpec

Object = dict[str, Any]

APP: Final = "argosy"
USER: Final = 10001  # of both images
GATEWAY_PORT: Final = 8000
SERVE_PORT: Final = 8000  # Serve's proxy on every Ray node (C20)
ENGINE_PORTS: Final = (7600, 7631)  # the first free one is a replica's (C20)
DASHBOARD_PORT: Final = 8265
AGENT_PORT: Final = 52365  # of a Ray node, with its health
RAY_METRICS_PORT: Final = 8080
LOADTEST_PORTS: Final = (5557, 8089)  # locust: its workers, its page

PULL_POLICY: Final = "IfNotPresent"
"""A digest never changes, and what has a tag on a small cluster was loaded there by hand."""

SETTINGS_PATH: Final = "/etc/argosy/settings"
SECRET_PATH: Final = "/etc/argosy/engine"
SECRET_FILE: Final = f"{SECRET_PATH}/secret"
HUB_TOKEN_PATH: Final = "/etc/argosy/hub"
OPERATOR_PATH: Final = "/etc/argosy/operator"
OPERATOR_TOKEN_FILE: Final = f"{OPERATOR_PATH}/token"
MODELS_PATH: Final = "/models"

GATEWAY: Final = "gateway"
HEAD: Final = "engine-head"
WORKER: Final = "engine-worker"
DIRECTORY: Final = "engine-directory"
WEIGHTS: Final = "weights"
BALLOON: Final = "balloon"
GPU_HEALTH: Final = "gpu-health"
LOADTEST: Final = "loadtest"
ENGINE: Final = (HEAD, WORKER, DIRECTORY)
"""Values of app.kubernetes.io/component."""

PRIORITIES: Final = {"head": 1_000_000, "gateway": 900_000, "serving": 800_000, "batch": 1_000, "balloon": -10}
"""PriorityClasses: the head outranks what it places, and a balloon yields to everything."""


def name_of(spec: ServingSpec, *parts: str) -> str:
    return "-".join((spec.name, *parts))


def selector(spec: ServingSpec, component: str) -> dict[str, str]:
    """Labels by which pods are found: ours, since KubeRay's own carry generated names."""
    return {"app.kubernetes.io/instance": spec.name, "app.kubernetes.io/component": component}


def pods_of(spec: ServingSpec, *components: str) -> Object:
    """Pods of ours by component."""
    expression = {"key": "app.kubernetes.io/component", "operator": "In", "values": sorted(components)}
    return {"matchExpressions": [expression], "matchLabels": {"app.kubernetes.io/instance": spec.name}}


def labels(spec: ServingSpec, component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": APP, **selector(spec, component), "app.kubernetes.io/part-of": APP}


def metadata(spec: ServingSpec, name: str, component: str, **more: Any) -> Object:
    return {"name": name, "namespace": spec.namespace, "labels": labels(spec, component), **more}


def cluster_metadata(spec: ServingSpec, name: str, component: str, **more: Any) -> Object:
    """Of an object that belongs to no namespace."""
    return {"name": name, "labels": {**labels(spec, component), **more.pop("labels", {})}, **more}


def priority_class(spec: ServingSpec, kind: str) -> str:
    return name_of(spec, kind)


def engine_secret(spec: ServingSpec) -> str:
    """The Secret that gateways and replicas prove to each other (C22); made by whoever deploys."""
    return name_of(spec, "engine")


def hub_secret(spec: ServingSpec) -> str:
    """The Secret with a hub's token, for models that ask for one; optional."""
    return name_of(spec, "hub")


def operator_secret(spec: ServingSpec) -> str:
    """The Secret with the operators' token; optional: without it /console and /v1/requests answer through a
    port-forward alone, which comes from the pod's own loopback."""
    return name_of(spec, "operator")


def external_secrets(spec: ServingSpec) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Secrets that the manifests use and do not hold: name -> (keys, whether pods start without it)."""
    found: dict[str, tuple[tuple[str, ...], bool]] = {
        engine_secret(spec): (("secret",), False),
        operator_secret(spec): (("token",), True),
    }
    if spec.has("gateway-api") and spec.cluster.gateway_certificate:
        found[spec.cluster.gateway_certificate] = (("tls.crt", "tls.key"), False)
    if not spec.has("weights-image"):
        found[hub_secret(spec)] = (("token",), True)
    if spec.images.pull_secret:
        found[spec.images.pull_secret] = ((".dockerconfigjson",), False)
    return found


# --- pods ---------------------------------------------------------------------------------------


def container_security() -> Object:
    """What the `restricted` profile asks for, and a root that nobody writes to."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def pod_security() -> Object:
    return {
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "runAsGroup": USER,
        "runAsNonRoot": True,
        "runAsUser": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def pod(spec: ServingSpec, *, service_account: str, priority: str, grace_s: int, **more: Any) -> Object:
    """A pod's spec: no token, no service links, one search less per look-up. more: `containers`, `volumes`, …"""
    settled: Object = {
        "automountServiceAccountToken": False,
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
        "enableServiceLinks": False,
        "priorityClassName": priority_class(spec, priority),
        "securityContext": pod_security(),
        "serviceAccountName": service_account,
        "terminationGracePeriodSeconds": grace_s,
    }
    if spec.images.pull_secret:
        settled["imagePullSecrets"] = [{"name": spec.images.pull_secret}]
    return settled | more


def http_probe(path: str, port: str | int, *, period_s: int, timeout_s: int, failures: int) -> Object:
    return {
        "failureThreshold": failures,
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
    }


def spread(spec: ServingSpec, component: str, topology: str, *, is_required: bool, generation: str) -> Object:
    """generation: label that tells one rollout's pods from the next; each is spread by itself."""
    return {
        "labelSelector": {"matchLabels": selector(spec, component)},
        "matchLabelKeys": [generation],
        "maxSkew": 1,
        "topologyKey": topology,
        "whenUnsatisfiable": "DoNotSchedule" if is_required else "ScheduleAnyway",
    }


def gpu_tolerations(spec: ServingSpec) -> list[Object]:
    """For GPU pods alone: nodes with GPUs are tainted with the resource's name."""
    return [{"effect": "NoSchedule", "key": spec.cluster.gpu_resource, "operator": "Exists"}]


def off_gpu_nodes(spec: ServingSpec) -> Object:
    """Affinity that keeps a pod off nodes with GPUs."""
    expression = {"key": spec.cluster.gpu_node_label, "operator": "DoesNotExist"}
    terms = [{"matchExpressions": [expression]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def memory_volume(name: str, size: str) -> Object:
    return {"emptyDir": {"medium": "Memory", "sizeLimit": size}, "name": name}


def scratch_volume(name: str, size: str) -> Object:
    return {"emptyDir": {"sizeLimit": size}, "name": name}


def service_account(spec: ServingSpec, name: str, component: str) -> Object:
    return {
        "apiVersion": "v1",
        "automountServiceAccountToken": False,
        "kind": "ServiceAccount",
        "metadata": metadata(spec, name, component),
    }
