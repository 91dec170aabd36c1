"""For each check of `argosy k8s doctor` a way to make its fault on a healthy deployment. check -> what breaks it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from k8s.gpu_guard import FAULT, UNVERIFIED
from tests.k8s.api_json import Object
from tests.k8s.cluster_fixture import World
from tests.k8s.operators import make_node

Break = Callable[[World], None]
OLD = "2020-01-01T00:00:00Z"


def edit(kind: str, name: str, change: Callable[[Any], object]) -> Break:
    """Changes an object as it is stored. name: "" = every one of the kind."""

    def act(world: World) -> None:
        for thing in world.running.all(kind):
            if name in ("", thing["metadata"]["name"]):
                change(thing)
                world.running.put(thing)

    return act


def pods(part: str, change: Callable[[Any], object]) -> Break:
    def act(world: World) -> None:
        for pod in world.running.all("Pod"):
            if part in pod["metadata"]["name"]:
                change(pod)
                world.running.put(pod)

    return act


def drop(kind: str, name: str) -> Break:
    def act(world: World) -> None:
        for thing in world.running.all(kind):
            if thing["metadata"]["name"] == name:
                world.running.drop(thing)

    return act


def put(*things: Object) -> Break:
    return lambda world: world.running.put(*things)


def event(reason: str, message: str, about: str = "Pod argosy-gateway-0") -> Break:
    kind, name = about.split()
    return put(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"e-{reason.lower()}", "namespace": "argosy"},
            "reason": reason,
            "message": message,
            "type": "Normal" if reason == "Pulled" else "Warning",
            "lastTimestamp": "2030-01-01T00:00:00Z",
            "involvedObject": {"kind": kind, "name": name},
        }
    )


def waiting(reason: str) -> Callable[[Any], None]:
    def change(pod: Any) -> None:
        pod["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": reason, "message": "it says so"}}
        unready(pod)

    return change


def unready(pod: Any) -> None:
    pod["status"]["conditions"][1]["status"] = "False"


def unscheduled(pod: Any) -> None:
    said = "0/9 nodes are available: 9 Insufficient cpu."
    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": said}]


def ended(pod: Any, **state: Any) -> None:
    pod["status"]["containerStatuses"][0].update(lastState={"terminated": state}, restartCount=7)


def state_of(name: str, state: str) -> Break:
    return lambda world: world.fleet.states.update({name: state})  # type: ignore[attr-defined]


def deaf(world: World) -> None:
    world.running.state.pages.clear()
    world.running.state.on_exec = None


def probe_failed(world: World) -> None:
    pods("gateway-0", unready)(world)
    event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503")(world)


def full(world: World) -> None:
    fleet: Any = world.fleet  # type: ignore[attr-defined]
    first = fleet.progress

    def progress() -> Object:
        page = first()
        page["replicas"][0].update(blocks_used=99, num_waiting=5)
        return page  # type: ignore[no-any-return]

    world.running.state.pages["*/proxy/progressz"] = progress


def not_ready(node: Any) -> None:
    node["status"]["conditions"] = [{"type": "Ready", "status": "False", "reason": "KubeletDown", "message": "gone"}]


def pressed(node: Any) -> None:
    node["status"]["conditions"].append({"type": "DiskPressure", "status": "True"})


def grace(cluster: Any) -> None:
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"] = 30


def no_shm(cluster: Any) -> None:
    spec = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != "shm"]


def condition(kind: str, status: str, **more: Any) -> Callable[[Any], None]:
    def change(thing: Any) -> None:
        entries = thing.setdefault("status", {}).setdefault("conditions", [])
        entries[:] = [entry for entry in entries if entry["type"] != kind]
        entries.append({"type": kind, "status": status, "reason": "Because", "message": "it says so", **more})

    return change


def budget(**status: Any) -> Callable[[Any], None]:
    return lambda thing: thing["status"].update(status)


def application(service: Any) -> None:
    states = service["status"]["activeServiceStatus"]["applicationStatuses"]
    states["model"] = {"status": "UNHEALTHY", "message": "the replica is sick"}


def orphan(world: World) -> None:
    [cluster] = world.running.all("RayCluster")
    metadata = {**cluster["metadata"], "name": "argosy-old", "creationTimestamp": OLD, "uid": "u"}
    world.running.put({**cluster, "metadata": metadata})


def tainted(key: str, **more: str) -> Break:
    return put(
        make_node("marked", gpus=8, labels=GPU_LABELS, taints=[GPU, {"key": key, "effect": "NoExecute", **more}])
    )


def revision(status: str) -> Callable[[Any], None]:
    return lambda secret: secret["metadata"]["labels"].update({"argosy/status": status})


GPU = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
GPU_LABELS = {"nvidia.com/gpu.product": "X"}
MONITORING = "servicemonitors.monitoring.coreos.com"

BREAKS: dict[str, Break] = {
    "api-version": lambda world: setattr(world.running.state, "version", "v1.30.1"),
    "kubelet-skew": edit("Node", "node-1", lambda n: n["status"]["nodeInfo"].update(kubeletVersion="v1.31.0")),
    "crd-ray": drop("CustomResourceDefinition", "rayclusters.ray.io"),
    "crd-monitoring": drop("CustomResourceDefinition", MONITORING),
    "kuberay-operator": edit("Deployment", "kuberay-operator", lambda d: d["status"].update(availableReplicas=0)),
    "kuberay-version": edit(
        "Deployment",
        "kuberay-operator",
        lambda d: d["spec"]["template"]["spec"]["containers"][0].update(image="quay.io/kuberay/operator:v1.3.2"),
    ),
    "nodes-ready": put(make_node("sick", conditions=[{"type": "Ready", "status": "Unknown"}])),
    "node-pressure": edit("Node", "node-1", pressed),
    "node-cordoned": edit("Node", "node-1", lambda n: n["spec"].update(unschedulable=True)),
    "gpu-fault": tainted(FAULT, value="xid-79"),
    "gpu-unverified": tainted(UNVERIFIED),
    "gpu-allocatable": edit("Node", "gpu-1", lambda n: n["status"]["allocatable"].pop("nvidia.com/gpu")),
    "gpu-labels": edit("Node", "gpu-1", lambda n: n["metadata"]["labels"].pop("nvidia.com/gpu.present")),
    "gpu-taints": edit("Node", "gpu-1", lambda n: n["spec"]["taints"].append({"key": "team", "effect": "NoSchedule"})),
    "gpu-pods-elsewhere": edit("Node", "gpu-1", lambda n: n["spec"].update(taints=[])),
    "storage-class": edit("StorageClass", "", lambda s: s["metadata"].update(annotations={})),
    "priority-classes": drop("PriorityClass", "argosy-head"),
    "metrics-api": drop("APIService", "v1beta1.metrics.k8s.io"),
    "custom-metrics-api": drop("APIService", "v1beta1.custom.metrics.k8s.io"),
    "api-services": edit("APIService", "v1beta1.metrics.k8s.io", condition("Available", "False")),
    "dns": pods("coredns", unready),
    "namespace": drop("Namespace", "argosy"),
    "pod-security": edit("Namespace", "argosy", lambda n: n["metadata"].update(labels={})),
    "named-namespaces": drop("Namespace", "monitoring"),
    "network-policies": drop("NetworkPolicy", "argosy-deny"),
    "engine-secret": edit(
        "Secret", "argosy-engine", lambda s: s.update(data={"secret": base64.b64encode(b"short").decode()})
    ),
    "pull-secret": drop("Secret", "registry"),
    "quota": edit(
        "ResourceQuota", "argosy-quota", lambda q: q.update(status={"used": {"pods": q["spec"]["hard"]["pods"]}})
    ),
    "placeholder-images": lambda world: None,  # of the spec, not of the cluster
    "image-digests": lambda world: None,
    "pdb-deadlock": edit(
        "PodDisruptionBudget", "argosy-head", budget(expectedPods=1, currentHealthy=1, desiredHealthy=1)
    ),
    "pdb-empty": edit("PodDisruptionBudget", "argosy-head", budget(observedGeneration=1, expectedPods=0)),
    "pdb-held": edit(
        "PodDisruptionBudget", "argosy-head", budget(expectedPods=2, currentHealthy=1, disruptionsAllowed=0)
    ),
    "hpa-unknown": edit("HorizontalPodAutoscaler", "", condition("ScalingActive", "False")),
    "hpa-at-limit": edit(
        "HorizontalPodAutoscaler",
        "",
        lambda h: (
            condition("ScalingLimited", "True")(h),
            h["status"].update(desiredReplicas=h["spec"]["maxReplicas"]),
        ),
    ),
    "revision": edit("Secret", "argosy-revision-000001", revision("failed")),
    "ray-service": edit("RayService", "argosy", condition("Ready", "False")),
    "serve-applications": edit("RayService", "argosy", application),
    "upgrade-stuck": edit("RayService", "argosy", condition("UpgradeInProgress", "True", lastTransitionTime=OLD)),
    "removed-thresholds": edit("RayService", "argosy", lambda s: s["spec"].update(serviceUnhealthySecondThreshold=9)),
    "orphan-clusters": orphan,
    "ray-versions": pods("-head", lambda p: p["spec"]["containers"][0].update(image="other:1")),
    "grace-drain": edit("RayCluster", "", grace),
    "deletion-delay": edit("RayService", "argosy", lambda s: s["spec"].update(rayClusterDeletionDelaySeconds=1)),
    "shared-memory": edit("RayCluster", "", no_shm),
    "head-placement": pods("-head", lambda p: p["spec"].update(nodeName="gpu-1")),
    "head-storage": edit(
        "RayService", "argosy", lambda s: s["spec"]["rayClusterConfig"].pop("gcsFaultToleranceOptions")
    ),
    "replicas-known": deaf,
    "replicas-well": state_of("r0", "stalled"),
    "replicas-enough": state_of("r0", "loading"),
    "kv-pressure": full,
    "pods-pending": pods("gateway-0", unscheduled),
    "image-pulls": pods("gateway-0", waiting("ImagePullBackOff")),
    "slow-pulls": event(
        "Pulled", 'Successfully pulled image "argosy-engine:0.1.0" in 3m12.5s (3m12.5s including waiting)'
    ),
    "containers-start": pods("gateway-0", waiting("CreateContainerConfigError")),
    "pods-created": event("FailedCreate", "exceeded quota: argosy-quota", "ReplicaSet argosy-gateway-abc"),
    "oom": pods("gateway-0", lambda p: ended(p, reason="OOMKilled", exitCode=137)),
    "restarts": pods("gateway-0", lambda p: ended(p, reason="Error", exitCode=1)),
    "probes": probe_failed,
    "evicted-pods": pods("gateway-0", lambda p: p["status"].update(phase="Failed", reason="Evicted")),
    "stuck-leaving": pods(
        "gateway-0", lambda p: (p["metadata"].update(deletionTimestamp=OLD), p["spec"].update(nodeName="gone"))
    ),
    "service-accounts": pods("gateway-0", lambda p: p["spec"].pop("automountServiceAccountToken")),
    "gateway-deployment": edit("Deployment", "argosy-gateway", lambda d: d["status"].update(availableReplicas=0)),
    "gateway-endpoints": edit("EndpointSlice", "argosy-gateway-x", lambda s: s.update(endpoints=[])),
    "gateway-spread": pods("gateway-", lambda p: p["spec"].update(nodeName="node-1")),
    "directory": drop("EndpointSlice", "argosy-serve-svc-x"),
}


def surroundings() -> list[Object]:
    """What a healthy cluster has beside the deployment."""

    def thing(kind: str, name: str, api: str, namespace: str = "", **more: Any) -> Object:
        metadata = {"name": name, **({"namespace": namespace} if namespace else {}), **more.pop("metadata", {})}
        return {"apiVersion": api, "kind": kind, "metadata": metadata, **more}

    def endpoints(service: str) -> Object:
        labels = {"labels": {"kubernetes.io/service-name": service}}
        ready = [{"conditions": {"ready": True}}]
        return thing("EndpointSlice", f"{service}-x", "discovery.k8s.io/v1", "argosy", metadata=labels, endpoints=ready)

    available = {"conditions": [{"type": "Available", "status": "True"}]}
    crds = ["rayservices.ray.io", "rayclusters.ray.io"]
    crds += [f"{kind}.monitoring.coreos.com" for kind in ("servicemonitors", "podmonitors", "prometheusrules")]
    default = {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
    operator = {"containers": [{"name": "o", "image": "quay.io/kuberay/operator:v1.7.0"}]}
    ready = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]
    return [
        *(thing("CustomResourceDefinition", name, "apiextensions.k8s.io/v1", spec={}) for name in crds),
        *(thing("Namespace", name, "v1") for name in ("ingress-nginx", "monitoring", "kuberay-system", "kube-system")),
        thing("StorageClass", "fast", "storage.k8s.io/v1", metadata=default),
        *(
            thing("APIService", name, "apiregistration.k8s.io/v1", spec={"service": {"name": "s"}}, status=available)
            for name in ("v1beta1.metrics.k8s.io", "v1beta1.custom.metrics.k8s.io")
        ),
        thing(
            "Deployment",
            "kuberay-operator",
            "apps/v1",
            "kuberay-system",
            metadata={"labels": {"app.kubernetes.io/name": "kuberay-operator"}},
            spec={"replicas": 1, "template": {"metadata": {"labels": {}}, "spec": operator}},
            status={"availableReplicas": 1, "observedGeneration": 1},
        ),
        thing(
            "Pod",
            "coredns-1",
            "v1",
            "kube-system",
            metadata={"labels": {"k8s-app": "kube-dns"}},
            spec={"containers": []},
            status={"conditions": ready},
        ),
        endpoints("argosy-gateway"),
        endpoints("argosy-serve-svc"),
        thing("Secret", "registry", "v1", "argosy", data={}),
        make_node("node-2"),
        make_node("gpu-1", gpus=8, labels=GPU_LABELS, taints=[GPU]),
    ]
