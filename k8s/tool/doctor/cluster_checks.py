"""Checks of the cluster itself: versions, what is installed, nodes, GPUs, classes, metrics, DNS."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k8s.dra import UNCOUNTED
from k8s.gpu_guard import FAULT, UNVERIFIED
from k8s.objects import PRIORITIES, Object, priority_class
from k8s.tool import reasons
from k8s.tool.capacity import is_ready, tolerates
from k8s.tool.doctor import facts as of
from k8s.tool.doctor.facts import Facts
from k8s.tool.doctor.table import ERROR, WARNING, NotKnown, Table
from k8s.tool.quantities import number

TABLE = Table()
OLDEST = (1, 34)  # trafficDistribution PreferSameZone; the preStop sleep is older
IMAGE_VOLUMES = (1, 35)  # on by default since; stable in 1.36
OLDEST_KUBERAY = (1, 5)
RAY_CRDS = ("rayservices.ray.io", "rayclusters.ray.io")
MONITORING_CRDS = tuple(
    f"{kind}.monitoring.coreos.com" for kind in ("servicemonitors", "podmonitors", "prometheusrules")
)


@TABLE.check("api-version", WARNING, "upgrade the cluster; the manifests are written for newer servers", of.VERSION)
def api_version(facts: Facts) -> Iterator[str]:
    found = _version(facts.version)
    oldest = IMAGE_VOLUMES if facts.spec.has("weights-image") else OLDEST
    if found and found < oldest:
        yield f"the API server is {facts.version}, older than {oldest[0]}.{oldest[1]}"


@TABLE.check("kubelet-skew", WARNING, "upgrade the nodes: a kubelet may be three minor versions behind", of.NODES)
def kubelet_skew(facts: Facts) -> Iterator[str]:
    server = _version(facts.version)
    for node in facts.lists[of.NODES]:
        found = _version(node["status"].get("nodeInfo", {}).get("kubeletVersion", ""))
        if server and found and (found > server or found[1] < server[1] - 3):
            yield f"node {_name(node)} runs {found[0]}.{found[1]}, the API server {server[0]}.{server[1]}"
        elif found and found < IMAGE_VOLUMES and facts.spec.has("weights-image"):
            yield f"node {_name(node)} runs {found[0]}.{found[1]}, which mounts no image of weights"


@TABLE.check("crd-ray", ERROR, "install the CRDs of KubeRay 1.7: helm install kuberay-operator", of.CRDS)
def crd_ray(facts: Facts) -> Iterator[str]:
    yield from _missing_crds(facts, RAY_CRDS)


@TABLE.check(
    "crd-monitoring",
    ERROR,
    "install the Prometheus operator, or set cluster.has_prometheus_operator: false in the spec",
    of.CRDS,
)
def crd_monitoring(facts: Facts) -> Iterator[str]:
    if facts.spec.cluster.has_prometheus_operator:
        yield from _missing_crds(facts, MONITORING_CRDS)


@TABLE.check(
    "kuberay-operator",
    ERROR,
    "start the KubeRay operator, or name its namespace in cluster.operator_namespace",
    of.OPERATOR,
)
def kuberay_operator(facts: Facts) -> Iterator[str]:
    found = facts.lists[of.OPERATOR]
    if not found:
        yield f"no Deployment of the KubeRay operator is in {facts.spec.cluster.operator_namespace}"
    for deployment in found:
        if not (deployment.get("status") or {}).get("availableReplicas"):
            yield f"the KubeRay operator {_name(deployment)} is not available"


@TABLE.check("kuberay-version", WARNING, "upgrade the KubeRay operator to 1.7, and its CRDs with it", of.OPERATOR)
def kuberay_version(facts: Facts) -> Iterator[str]:
    for deployment in facts.lists[of.OPERATOR]:
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            found = _version(container["image"].partition("@")[0].rpartition(":")[2])
            if found and found < OLDEST_KUBERAY:
                yield f"the KubeRay operator is {found[0]}.{found[1]}; its RayService lacks fields that we set"


@TABLE.check("nodes-ready", WARNING, "look at the kubelet of the node, or drain and replace it", of.NODES)
def nodes_ready(facts: Facts) -> Iterator[str]:
    for node in facts.lists[of.NODES]:
        if not is_ready(node):
            yield f"node {_name(node)} is not ready: {_condition_text(node, 'Ready')}"


@TABLE.check("node-pressure", WARNING, "free memory or disk on the node; pods there will be evicted", of.NODES)
def node_pressure(facts: Facts) -> Iterator[str]:
    for node in facts.lists[of.NODES]:
        for kind in ("MemoryPressure", "DiskPressure", "PIDPressure"):
            if reasons.condition(node, kind) == "True":
                yield f"node {_name(node)} has {kind}"


@TABLE.check("node-cordoned", WARNING, "`kubectl uncordon NODE` when its work is done", of.NODES, "Pod")
def node_cordoned(facts: Facts) -> Iterator[str]:
    used = {pod["spec"].get("nodeName") for pod in facts.fleet.pods()}
    for node in facts.lists[of.NODES]:
        if (node.get("spec") or {}).get("unschedulable") and _name(node) in used:
            yield f"node {_name(node)} is cordoned and still runs pods of ours: `argosy k8s drain {_name(node)}`"


@TABLE.check(
    "gpu-fault", ERROR, "`argosy k8s drain NODE`, repair it, `argosy k8s preflight SPEC NODE --clear-fault`", of.NODES
)
def gpu_fault(facts: Facts) -> Iterator[str]:
    for node, taint in _tainted(facts, FAULT):
        yield f"node {_name(node)} has a faulty GPU: {taint.get('value', '')}"


@TABLE.check("gpu-unverified", WARNING, "`argosy k8s preflight SPEC`, or the component gpu-health", of.NODES)
def gpu_unverified(facts: Facts) -> Iterator[str]:
    for node, _ in _tainted(facts, UNVERIFIED):
        yield f"node {_name(node)} waits for the test of its GPUs"


@TABLE.check(
    "gpu-allocatable", ERROR, "nodes with more GPUs, fewer ranks per host, or the NVIDIA device plugin", of.NODES
)
def gpu_allocatable(facts: Facts) -> Iterator[str]:
    if facts.spec.has("dra"):
        raise NotKnown(UNCOUNTED)
    wanted, resource = facts.sizing.gpus_per_pod, facts.spec.cluster.gpu_resource
    counts = [number(n["status"].get("allocatable", {}).get(resource, 0)) or 0.0 for n in facts.lists[of.NODES]]
    if wanted and max(counts, default=0.0) < wanted:
        yield f"a pod asks for {wanted} {resource}, and the largest node has {max(counts, default=0.0):g}"


def _has_gpus(facts: Facts, node: Object) -> bool:
    """By what the node can give; where GPUs are claimed, by its label."""
    cluster = facts.spec.cluster
    if facts.spec.has("dra"):
        return bool((node["metadata"].get("labels") or {}).get(cluster.gpu_node_label) == "true")
    return bool(number(node["status"].get("allocatable", {}).get(cluster.gpu_resource, 0)))


@TABLE.check("gpu-labels", ERROR, "run GPU feature discovery, or correct cluster.gpu_product in the spec", of.NODES)
def gpu_labels(facts: Facts) -> Iterator[str]:
    for key, value in (facts.worker_template.get("nodeSelector") or {}).items():
        if not any(node["metadata"].get("labels", {}).get(key) == value for node in facts.lists[of.NODES]):
            yield f"no node has the label {key}={value} that engine pods ask for"


@TABLE.check("gpu-taints", ERROR, "remove the taint, or run the engine on other nodes", of.NODES)
def gpu_taints(facts: Facts) -> Iterator[str]:
    if not facts.spec.has_gpus:
        return
    tolerations = facts.worker_template.get("tolerations") or []
    for node in facts.lists[of.NODES]:
        if not _has_gpus(facts, node):
            continue
        for taint in (node.get("spec") or {}).get("taints") or []:
            ours = taint["key"] in (FAULT, UNVERIFIED) or taint["key"].startswith("node.kubernetes.io/")
            if taint["effect"] != "PreferNoSchedule" and not ours and not any(tolerates(t, taint) for t in tolerations):
                yield f"engine pods do not tolerate the taint {taint['key']}:{taint['effect']} of node {_name(node)}"


@TABLE.check(
    "gpu-pods-elsewhere",
    WARNING,
    "taint GPU nodes with the GPU resource's name, so that only GPU pods go there",
    of.NODES,
)
def gpu_pods_elsewhere(facts: Facts) -> Iterator[str]:
    resource = facts.spec.cluster.gpu_resource
    for node in facts.lists[of.NODES]:
        taints = {taint["key"] for taint in (node.get("spec") or {}).get("taints") or []}
        if facts.spec.has_gpus and _has_gpus(facts, node) and resource not in taints:
            yield f"node {_name(node)} has GPUs and no taint {resource}: pods without GPUs may fill it"


@TABLE.check(
    "storage-class", ERROR, "mark a StorageClass as the default one, or name one in cluster.storage_class", of.STORAGE
)
def storage_class(facts: Facts) -> Iterator[str]:
    cluster, classes = facts.spec.cluster, facts.lists[of.STORAGE]
    names = {_name(found) for found in classes}
    key = "storageclass.kubernetes.io/is-default-class"
    has_default = any(found["metadata"].get("annotations", {}).get(key) == "true" for found in classes)
    for component, name in (("gcs-rocksdb", cluster.storage_class), ("weights-pvc", cluster.shared_storage_class)):
        if facts.spec.has(component) and not name and not has_default:
            yield f"{component} needs a volume, and no StorageClass is the default one"
        if facts.spec.has(component) and name and name not in names:
            yield f"{component} asks for the StorageClass {name}; there are {', '.join(sorted(names)) or 'none'}"


@TABLE.check(
    "priority-classes", ERROR, "`argosy k8s deploy SPEC`, or have an administrator apply k8s/base/policy", of.CLASSES
)
def priority_classes(facts: Facts) -> Iterator[str]:
    names = {_name(found) for found in facts.lists[of.CLASSES]}
    for kind in PRIORITIES:
        if priority_class(facts.spec, kind) not in names:
            yield f"there is no PriorityClass {priority_class(facts.spec, kind)}: pods that name it are refused"


@TABLE.check("metrics-api", WARNING, "install metrics-server: CPU is what the gateways' autoscaler reads", of.APIS)
def metrics_api(facts: Facts) -> Iterator[str]:
    if facts.spec.gateway.max_replicas > facts.spec.gateway.min_replicas:
        yield from _api_service(facts, "v1beta1.metrics.k8s.io")


@TABLE.check(
    "custom-metrics-api",
    WARNING,
    "install prometheus-adapter, or set cluster.has_pod_metrics: false in the spec",
    of.APIS,
)
def custom_metrics_api(facts: Facts) -> Iterator[str]:
    if facts.spec.cluster.has_pod_metrics:
        yield from _api_service(facts, "v1beta1.custom.metrics.k8s.io", "v1beta2.custom.metrics.k8s.io")


@TABLE.check("api-services", WARNING, "repair or delete the APIService: its groups answer with errors", of.APIS)
def api_services(facts: Facts) -> Iterator[str]:
    for found in facts.lists[of.APIS]:
        if reasons.condition(found, "Available") == "False":
            owner = (found["spec"].get("service") or {}).get("name", "?")
            why = _condition_text(found, "Available")
            yield f"APIService {_name(found)}, owned by {owner}, is not available: {why}"


@TABLE.check("dns", ERROR, "look at CoreDNS: gateways find the directory by name", of.DNS)
def dns(facts: Facts) -> Iterator[str]:
    pods = facts.lists[of.DNS]
    if not any(reasons.is_ready(pod) for pod in pods):
        yield f"none of {len(pods)} pods with k8s-app=kube-dns in kube-system is ready"


def _missing_crds(facts: Facts, names: tuple[str, ...]) -> Iterator[str]:
    there = {_name(found) for found in facts.lists[of.CRDS]}
    yield from (f"there is no CustomResourceDefinition {name}" for name in names if name not in there)


def _api_service(facts: Facts, *names: str) -> Iterator[str]:
    found = [thing for thing in facts.lists[of.APIS] if _name(thing) in names]
    if not any(reasons.condition(thing, "Available") == "True" for thing in found):
        yield f"no available APIService {' or '.join(names)}: the autoscaler sees <unknown>"


def _tainted(facts: Facts, key: str) -> Iterator[tuple[Object, Object]]:
    for node in facts.lists[of.NODES]:
        for taint in (node.get("spec") or {}).get("taints") or []:
            if taint["key"] == key:
                yield node, taint


def _condition_text(thing: Object, kind: str) -> str:
    for entry in (thing.get("status") or {}).get("conditions") or []:
        if entry["type"] == kind:
            return f"{entry.get('reason', '')} {entry.get('message', '')}".strip()
    return "it does not say"


def _version(text: str) -> tuple[int, int] | None:
    match = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(match.group(1)), int(match.group(2))) if match else None


def _name(thing: Object) -> str:
    return str(thing["metadata"]["name"])
