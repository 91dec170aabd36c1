"""What KubeRay, the Deployment controller and Jobs make of objects, as far as a client sees it. For the emulator."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from k8s.objects import PRIORITIES
from tests.k8s.api_json import Object
from tests.k8s.api_server import ApiServer

SILENT = ("replicas", "minReplicas", "maxReplicas")


@dataclasses.dataclass(slots=True)
class Operators:
    """Every object is ready as soon as it is applied, unless a test says otherwise."""

    application: str = "RUNNING"
    message: str = ""
    holds_gateway: bool = False
    makes_pods: bool = True
    num_clusters: int = 0
    bad_engine: str = ""  # a Ray cluster whose spec holds this text fails to deploy
    bad_image: str = ""  # pods with an image that holds this text never start

    def __call__(self, server: ApiServer, event: str, thing: Object) -> None:
        if event == "DELETED":
            if thing["kind"] == "RayCluster":
                self._cluster_deleted(server, thing)
            return
        if thing["kind"] == "RayService" and _is_new(thing):
            self._ray_service(server, thing)
        if thing["kind"] == "Deployment" and _is_new(thing):
            self._deployment(server, thing)
        if thing["kind"] == "Job":
            thing = server.find("Job", thing["metadata"]["name"], thing["metadata"]["namespace"]) or thing
            if (thing.get("status") or {}).get("conditions"):
                return
            thing["status"] = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}
            server.store(thing)

    def _ray_service(self, server: ApiServer, service: Object) -> None:
        namespace = service["metadata"]["namespace"]
        status = service.setdefault("status", {})
        active = (status.get("activeServiceStatus") or {}).get("rayClusterName", "")
        cluster = server.find("RayCluster", active, namespace) if active else None
        wanted = service["spec"]["rayClusterConfig"]
        old: Object | None = None
        strategy = (service["spec"].get("upgradeStrategy") or {}).get("type", "NewCluster")
        if cluster is None or (_hashed(cluster["spec"]) != _hashed(wanted) and strategy != "None"):
            old = cluster
            self.num_clusters += 1
            name = f"{service['metadata']['name']}-{self.num_clusters:05d}"
            metadata = {"name": name, "namespace": namespace, "labels": dict(service["metadata"].get("labels", {}))}
            cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": wanted}
            server.store(cluster)
            if self.makes_pods:
                self._make_pods(server, cluster)
        is_bad = bool(self.bad_engine) and self.bad_engine in str(cluster["spec"])
        application = "DEPLOY_FAILED" if is_bad else self.application
        applications = {name: {"status": application, "message": self.message} for name in ("directory", "model")}
        is_ready = application == "RUNNING"
        status.update(
            observedGeneration=service["metadata"]["generation"],
            activeServiceStatus={
                "rayClusterName": cluster["metadata"]["name"],
                "applicationStatuses": applications,
            },
            conditions=[
                {"type": "Ready", "status": str(is_ready), "reason": "NonZeroServeEndpoints", "message": ""},
                {"type": "UpgradeInProgress", "status": "False", "reason": "NoPendingCluster", "message": ""},
            ],
            numServeEndpoints=1,
        )
        server.store(service)
        if old is not None:
            self._drop_pods(server, old)
            server.drop(old)

    def _cluster_deleted(self, server: ApiServer, cluster: Object) -> None:
        self._drop_pods(server, cluster)

    def _make_pods(self, server: ApiServer, cluster: Object) -> None:
        name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        head = cluster["spec"]["headGroupSpec"]["template"]
        self._make_pod(server, f"{name}-head", namespace, head, name)
        for group in cluster["spec"]["workerGroupSpecs"]:
            for i in range(group["replicas"] * group.get("numOfHosts", 1)):
                self._make_pod(server, f"{name}-{group['groupName']}-{i}", namespace, group["template"], name)

    def _make_pod(self, server: ApiServer, name: str, namespace: str, template: Object, cluster: str) -> None:
        server.store(make_pod(name, namespace, template, cluster=cluster, bad_image=self.bad_image))

    def _drop_pods(self, server: ApiServer, cluster: Object) -> None:
        for pod in server.all("Pod", cluster["metadata"]["namespace"]):
            if pod["metadata"]["labels"].get("ray.io/cluster") == cluster["metadata"]["name"]:
                server.drop(pod)

    def _deployment(self, server: ApiServer, thing: Object) -> None:
        wanted = thing["spec"].get("replicas", 1)
        done = 0 if self.holds_gateway else wanted
        namespace, name = thing["metadata"]["namespace"], thing["metadata"]["name"]
        for pod in server.all("Pod", namespace):
            if pod["metadata"]["labels"].get("app") == name:
                server.drop(pod)
        template = copy.deepcopy(thing["spec"]["template"])
        template["metadata"]["labels"]["app"] = name
        if self.makes_pods:
            for i in range(wanted):
                is_ready = not self.holds_gateway
                pod = make_pod(f"{name}-{i}", namespace, template, is_ready=is_ready, bad_image=self.bad_image)
                server.store(pod)
        thing["status"] = {
            "observedGeneration": thing["metadata"]["generation"],
            "replicas": wanted,
            "updatedReplicas": wanted,
            "availableReplicas": done,
        }
        server.store(thing)


def make_pod(
    name: str,
    namespace: str,
    template: Object,
    *,
    node: str = "node-1",
    cluster: str = "",
    is_ready: bool = True,
    bad_image: str = "",
) -> Object:
    labels = dict(template["metadata"]["labels"])
    if cluster:
        labels["ray.io/cluster"] = cluster
    kind = template["spec"].get("priorityClassName", "").rpartition("-")[2]  # as admission resolves it
    spec = {**copy.deepcopy(template["spec"]), "nodeName": node, "priority": PRIORITIES.get(kind, 0)}
    containers = spec["containers"]
    pulls = [c for c in containers if bad_image and bad_image in c["image"]]
    statuses: list[dict[str, Any]] = []
    for container in containers:
        state: Object = {"running": {}}
        if container in pulls:
            message = f'Back-off pulling image "{container["image"]}"'
            state = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
        statuses.append({"name": container["name"], "state": state, "restartCount": 0, "ready": is_ready})
    ready = "True" if is_ready and not pulls else "False"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": spec,
        "status": {
            "phase": "Pending" if pulls else "Running",
            "podIP": "10.0.0.1",
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": ready}],
            "containerStatuses": statuses,
        },
    }


def make_node(name: str, *, gpus: int = 0, cpus: str = "64", memory: str = "536870912Ki", **more: Any) -> Object:
    """A ready node; memory as kubelets tell it. more: `taints`, `labels`, `unschedulable`, `conditions`."""
    allocatable = {"cpu": cpus, "memory": memory, "pods": "110"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    labels = {"kubernetes.io/hostname": name, **more.get("labels", {})}
    if gpus:
        labels.setdefault("nvidia.com/gpu.present", "true")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "taints": more.get("taints", []),
            **({"unschedulable": True} if more.get("unschedulable") else {}),
        },
        "status": {
            "allocatable": allocatable,
            "conditions": more.get("conditions", [{"type": "Ready", "status": "True"}]),
            "nodeInfo": {"kubeletVersion": "v1.36.2", "kernelVersion": "6.8"},
        },
    }


def _is_new(thing: Object) -> bool:
    return (thing.get("status") or {}).get("observedGeneration") != thing["metadata"]["generation"]


def _hashed(spec: Object, num_groups: int | None = None) -> Object:
    """What KubeRay makes a hash of (the docstring of k8s/tool/upgrade.py). num_groups: only the first so many."""
    left = copy.deepcopy(spec)
    left["workerGroupSpecs"] = left.get("workerGroupSpecs", [])[:num_groups]
    for group in left["workerGroupSpecs"]:
        for name in SILENT:
            group.pop(name, None)
        group.get("scaleStrategy", {}).pop("workersToDelete", None)
    for part in (left["headGroupSpec"], *left["workerGroupSpecs"]):
        for name in ("tolerations", "schedulingGates"):
            part["template"]["spec"].pop(name, None)
    left.pop("upgradeStrategy", None)
    return left
