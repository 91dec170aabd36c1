"""Checks of the engine: its RayService, clusters, replicas, and the times that must fit each other."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from k8s.objects import Object
from k8s.tool import reasons
from k8s.tool.doctor import facts as of
from k8s.tool.doctor.facts import Facts
from k8s.tool.doctor.table import ERROR, WARNING, Table
from k8s.tool.kinds import RAY_CLUSTER, RAY_SERVICE
from k8s.tool.quantities import number

TABLE = Table()
KV_SHARE = 0.95
UPGRADE_MARGIN_S = 600.0
DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@TABLE.check("ray-service", ERROR, "`argosy k8s status` says what it waits for", RAY_SERVICE.name)
def ray_service(facts: Facts) -> Iterator[str]:
    service = facts.fleet.service
    if service is None:
        yield f"there is no RayService {facts.spec.name} in {facts.spec.namespace}"
    elif reasons.condition(service, "Ready") != "True":
        said = [str(reason) for reason in reasons.of_ray_service(service)]
        yield from said or [f"RayService {facts.spec.name} does not say that it is ready"]


@TABLE.check(
    "serve-applications", ERROR, "read the message; `kubectl logs` of the head has the whole trace", RAY_SERVICE.name
)
def serve_applications(facts: Facts) -> Iterator[str]:
    for reason in reasons.of_ray_service(facts.fleet.service or {"metadata": {}, "kind": "RayService"}):
        if reason.of.startswith("Serve"):
            yield str(reason)


@TABLE.check("upgrade-stuck", WARNING, "`argosy k8s status`; `argosy k8s rollback` ends it", RAY_SERVICE.name)
def upgrade_stuck(facts: Facts) -> Iterator[str]:
    service = facts.fleet.service
    if service is None or reasons.condition(service, "UpgradeInProgress") != "True":
        return
    entry = next(entry for entry in service["status"]["conditions"] if entry["type"] == "UpgradeInProgress")
    budget = facts.sizing.fetch_deadline_s + 5.0 * facts.sizing.startup_failures + UPGRADE_MARGIN_S
    age = _age_s(entry.get("lastTransitionTime", ""))
    if age is not None and age > budget:
        yield f"no second cluster has taken over for {age / 60:.0f} minutes; a start takes {budget / 60:.0f} at most"


@TABLE.check(
    "removed-thresholds",
    WARNING,
    "remove the fields; KubeRay rebuilt clusters again and again because of them",
    RAY_SERVICE.name,
)
def removed_thresholds(facts: Facts) -> Iterator[str]:
    spec = (facts.fleet.service or {}).get("spec") or {}
    for key in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
        if key in spec:
            yield f"RayService {facts.spec.name} sets {key}"


@TABLE.check(
    "orphan-clusters",
    WARNING,
    "`kubectl delete raycluster NAME`, if KubeRay does not within its delay",
    RAY_CLUSTER.name,
    RAY_SERVICE.name,
)
def orphan_clusters(facts: Facts) -> Iterator[str]:
    status = (facts.fleet.service or {}).get("status") or {}
    used = {(status.get(part) or {}).get("rayClusterName") for part in ("activeServiceStatus", "pendingServiceStatus")}
    delay_s = ((facts.fleet.service or {}).get("spec") or {}).get("rayClusterDeletionDelaySeconds", 60)
    for cluster in facts.fleet.items.get(RAY_CLUSTER, []):
        labels = cluster["metadata"].get("labels") or {}
        is_ours = labels.get("app.kubernetes.io/instance") == facts.spec.name
        age = _age_s(cluster["metadata"].get("creationTimestamp", "")) or 0.0
        if is_ours and cluster["metadata"]["name"] not in used and age > delay_s + UPGRADE_MARGIN_S:
            yield f"RayCluster {cluster['metadata']['name']} is neither active nor pending, and holds its nodes"


@TABLE.check("ray-versions", ERROR, "give head and workers one image; Ray of two versions does not join", "Pod")
def ray_versions(facts: Facts) -> Iterator[str]:
    by_cluster: dict[str, set[str]] = {}
    for pod in facts.fleet.pods("engine-head", "engine-worker", "engine-directory"):
        cluster = (pod["metadata"].get("labels") or {}).get("ray.io/cluster", "")
        by_cluster.setdefault(cluster, set()).add(pod["spec"]["containers"][0]["image"])
    for cluster, images in by_cluster.items():
        if len(images) > 1:
            yield f"RayCluster {cluster} runs several images: {', '.join(sorted(images))}"


@TABLE.check(
    "grace-drain", ERROR, "grace must exceed Ray's drain by 10 s: deploy the rendered manifests", RAY_CLUSTER.name
)
def grace_drain(facts: Facts) -> Iterator[str]:
    for name, template in _templates(facts):
        drains = [
            float(entry.get("value", 0))
            for container in template["containers"]
            for entry in container.get("env") or []
            if entry["name"] == DRAIN_VARIABLE
        ]
        grace = float(template.get("terminationGracePeriodSeconds", 30))
        drain = max(drains, default=30.0)  # Ray's default equals Kubernetes' and races SIGKILL
        if grace < drain + 10:
            yield f"{name}: a grace of {grace:g} s ends in the middle of Ray's drain of {drain:g} s"


@TABLE.check(
    "deletion-delay", WARNING, "raise rayClusterDeletionDelaySeconds above the engine's grace", RAY_SERVICE.name
)
def deletion_delay(facts: Facts) -> Iterator[str]:
    service = facts.fleet.service
    if service is not None:
        delay = float(service["spec"].get("rayClusterDeletionDelaySeconds", 60))
        grace = float(facts.worker_template.get("terminationGracePeriodSeconds", 30))
        if delay < grace:
            yield f"an old cluster is deleted after {delay:g} s, while its requests may take {grace:g} s"


@TABLE.check("shared-memory", ERROR, "mount an emptyDir with medium Memory at /dev/shm, as base does", RAY_CLUSTER.name)
def shared_memory(facts: Facts) -> Iterator[str]:
    wanted = facts.sizing.shm_bytes
    for name, template in _templates(facts, workers_only=True):
        volumes = {volume["name"]: volume for volume in template.get("volumes") or []}
        mounts = [mount for c in template["containers"] for mount in c.get("volumeMounts") or []]
        found = [volumes.get(mount["name"], {}) for mount in mounts if mount["mountPath"] == "/dev/shm"]
        memory = [volume.get("emptyDir") or {} for volume in found]
        if not any(entry.get("medium") == "Memory" for entry in memory):
            yield f"{name}: /dev/shm is the 64 MiB that every container gets"
        elif (size := number(memory[0].get("sizeLimit", 0)) or 0.0) < wanted:
            yield f"{name}: /dev/shm holds {size / 2**20:.0f} MiB of {wanted / 2**20:.0f} MiB"


@TABLE.check("head-placement", WARNING, "keep the head off GPU nodes: its affinity, as base has it", of.NODES, "Pod")
def head_placement(facts: Facts) -> Iterator[str]:
    label = facts.spec.cluster.gpu_node_label
    gpu_nodes = {
        node["metadata"]["name"] for node in facts.lists[of.NODES] if label in (node["metadata"].get("labels") or {})
    }
    for pod in facts.fleet.heads:
        if pod["spec"].get("nodeName") in gpu_nodes:
            yield f"the head {pod['metadata']['name']} is on the GPU node {pod['spec']['nodeName']}"


@TABLE.check(
    "head-storage",
    WARNING,
    "use the component gcs-rocksdb: without it the head's end is the cluster's",
    RAY_SERVICE.name,
)
def head_storage(facts: Facts) -> Iterator[str]:
    config = ((facts.fleet.service or {}).get("spec") or {}).get("rayClusterConfig")
    if facts.spec.is_prod and config is not None and "gcsFaultToleranceOptions" not in config:
        yield "the head keeps what it knows in memory alone"


@TABLE.check("replicas-known", WARNING, "let whoever runs this get pods/proxy or create pods/exec", "Pod")
def replicas_known(facts: Facts) -> Iterator[str]:
    if facts.fleet.replicas is None and facts.fleet.gateways:
        yield f"replicas are not known: {facts.fleet.unknown.get('replicas', '')}"


@TABLE.check(
    "replicas-well", ERROR, "`argosy k8s status`; a stalled replica ends itself after 10 s and comes back", of.REPLICAS
)
def replicas_well(facts: Facts) -> Iterator[str]:
    for replica in facts.fleet.replicas or []:
        if replica.state not in ("ready", "draining", "loading"):
            yield f"replica {replica.id} is {replica.state} {replica.facts.get('error', '')}".rstrip()


@TABLE.check(
    "replicas-enough", ERROR, "`argosy k8s status` says what the missing ones wait for", of.REPLICAS, RAY_SERVICE.name
)
def replicas_enough(facts: Facts) -> Iterator[str]:
    bounds = facts.fleet.bounds
    ready = [replica for replica in facts.fleet.replicas or [] if replica.state == "ready"]
    if facts.fleet.replicas is not None and bounds is not None and len(ready) < bounds[0]:
        yield f"{len(ready)} of {bounds[0]} engine replicas are ready"


@TABLE.check("kv-pressure", WARNING, "more replicas, or a lower engine.max_num_seqs: rows are preempted", of.REPLICAS)
def kv_pressure(facts: Facts) -> Iterator[str]:
    for replica in facts.fleet.replicas or []:
        used, total = replica.facts.get("blocks_used") or 0, replica.facts.get("blocks_total") or 0
        if total and used >= KV_SHARE * total and replica.facts.get("num_waiting"):
            share = 100 * used / total
            waiting = replica.facts["num_waiting"]
            yield f"replica {replica.id}: {share:.0f} % of its KV cache is used, and {waiting} requests wait"


def _templates(facts: Facts, *, workers_only: bool = False) -> Iterator[tuple[str, Object]]:
    """(what it is, pod spec) of every group of every cluster of ours."""
    for cluster in facts.fleet.items.get(RAY_CLUSTER, []):
        if (cluster["metadata"].get("labels") or {}).get("app.kubernetes.io/instance") != facts.spec.name:
            continue
        name, spec = cluster["metadata"]["name"], cluster["spec"]
        if not workers_only:
            yield f"RayCluster {name}, head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec.get("workerGroupSpecs") or []:
            if not workers_only or group["groupName"] == "workers":
                yield f"RayCluster {name}, {group['groupName']}", group["template"]["spec"]


def _age_s(time: str) -> float | None:
    try:
        begun = datetime.datetime.fromisoformat(time.replace("Z", "+00:00"))
    except ValueError:
        return None
    return (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
