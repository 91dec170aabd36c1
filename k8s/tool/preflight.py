"""Tests the GPUs of nodes before they take work: a Job on each, and its success takes the node's taint away.

The component gpu-health does this by itself for every node that joins; this is for clusters without it, and for a node
that came back from repair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence

from k8s.dra import UNCOUNTED
from k8s.gpu_guard import FAULT, UNVERIFIED
from k8s.objects import PULL_POLICY, Object, container_security, labels, memory_volume, metadata, pod_security
from k8s.objects import scratch_volume as scratch
from k8s.spec import ServingSpec
from k8s.tool import exits, reasons
from k8s.tool.capacity import is_ready
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError, Refused, ToolError
from k8s.tool.kinds import JOB, NODE, POD
from k8s.tool.progress import Progress
from k8s.tool.quantities import number, pod_requests
from k8s.tool.specs import place_holders

COMPONENT = "preflight"
JOB_S = 900
KEPT_S = 86_400  # a Job and its log stay a day
MAX_CONFLICTS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """nodes: names; empty = every GPU node with the taint."""

    nodes: tuple[str, ...] = ()
    timeout_s: float = 1200.0
    poll_s: float = 2.0
    clears_faults: bool = False


def preflight(cluster: Cluster, spec: ServingSpec, options: Options, progress: Progress) -> int:
    """An exit code: DONE when every node passed. Raises Refused for images that nobody has named and where GPUs are
    claimed, ToolError when nodes may not be read."""
    if why := place_holders(spec):
        raise Refused(why)
    if spec.has("dra"):
        raise Refused(f"preflight: it takes all GPUs that a node's allocatable counts, and {UNCOUNTED}")
    try:
        nodes = cluster.select(NODE, labels=f"{spec.cluster.gpu_node_label}=true").items
    except ApiError as error:
        if error.is_forbidden:
            raise ToolError(f"preflight: needs list on nodes: {error.message}") from None
        raise
    chosen = _chosen(nodes, options)
    if not chosen:
        progress.tell("done", f"no GPU node has the taint {UNVERIFIED}")
        return exits.DONE
    jobs: dict[str, str] = {}
    for node in chosen:
        name = node["metadata"]["name"]
        held = _gpus_in_use(cluster, name, spec.cluster.gpu_resource)
        if held:
            progress.tell("warning", f"node {name}: {held:g} of its GPUs are in use; drain it first")
            continue
        job = job_for(spec, node)
        cluster.delete(JOB, job["metadata"]["name"], spec.namespace)
        _create(cluster, job)
        jobs[name] = job["metadata"]["name"]
        progress.tell("started", f"node {name}: Job {jobs[name]}", node=name)
    passed = _await(cluster, spec, jobs, options, progress)
    for node in chosen:
        if node["metadata"]["name"] in passed:
            _clear(cluster, node["metadata"]["name"], options, progress)
    is_whole = len(passed) == len(chosen)
    progress.tell("done" if is_whole else "failed", f"{len(passed)} of {len(chosen)} nodes passed")
    return exits.DONE if is_whole else exits.UNFINISHED


def job_for(spec: ServingSpec, node: Object) -> Object:
    """`models.preflight` on all GPUs of a node, under the restricted profile."""
    name = node["metadata"]["name"]
    num_gpus = int(number(node["status"]["allocatable"].get(spec.cluster.gpu_resource, 0)) or 0)
    gpus = {spec.cluster.gpu_resource: str(num_gpus)}
    container = {
        "name": "preflight",
        "image": spec.images.engine,
        "imagePullPolicy": PULL_POLICY,
        "command": ["python", "-m", "models.preflight", *(f"cuda:{i}" for i in range(num_gpus))],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"limits": {"memory": "8Gi", **gpus}, "requests": {"cpu": "1", "memory": "8Gi", **gpus}},
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"mountPath": "/dev/shm", "name": "shm"}, {"mountPath": "/tmp", "name": "tmp"}],
    }
    template = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "enableServiceLinks": False,
        "nodeSelector": {"kubernetes.io/hostname": node["metadata"]["labels"]["kubernetes.io/hostname"]},
        "restartPolicy": "Never",
        "securityContext": pod_security(),
        "tolerations": [
            {"effect": "NoSchedule", "key": spec.cluster.gpu_resource, "operator": "Exists"},
            {"effect": "NoSchedule", "key": UNVERIFIED, "operator": "Exists"},
            {"key": FAULT, "operator": "Exists"},
        ],
        "volumes": [memory_volume("shm", "1Gi"), scratch("tmp", "1Gi")],
    }
    if spec.images.pull_secret:
        template["imagePullSecrets"] = [{"name": spec.images.pull_secret}]
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(spec, f"{spec.name}-preflight-{digest}", COMPONENT, annotations={"argosy/node": name}),
        "spec": {
            "activeDeadlineSeconds": JOB_S,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": {"labels": labels(spec, COMPONENT)}, "spec": template},
        },
    }


def _chosen(nodes: Sequence[Object], options: Options) -> list[Object]:
    """Raises ToolError for a name that is no GPU node."""
    if not options.nodes:
        return [node for node in nodes if is_ready(node) and _has_taint(node, UNVERIFIED)]
    known = {node["metadata"]["name"]: node for node in nodes}
    if unknown := [name for name in options.nodes if name not in known]:
        raise ToolError(f"NODE: {unknown[0]!r} is no GPU node; there are {', '.join(sorted(known)) or 'none'}")
    return [known[name] for name in options.nodes]


def _gpus_in_use(cluster: Cluster, node: str, resource: str) -> float:
    try:
        pods = cluster.select(POD, fields=f"spec.nodeName={node}").items
    except ApiError as error:
        if error.is_forbidden:
            return 0.0  # then the Job waits for them
        raise
    running = [pod for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    return sum(pod_requests(pod["spec"]).get(resource, 0.0) for pod in running)


def _create(cluster: Cluster, job: Object) -> None:
    """A Job of the same name may still be leaving."""
    deadline = time.monotonic() + cluster.timeout_s
    while True:
        try:
            cluster.create(job)
        except ApiError as error:
            if error.status != 409 or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def _await(cluster: Cluster, spec: ServingSpec, jobs: dict[str, str], options: Options, progress: Progress) -> set[str]:
    """Nodes whose Job has succeeded, once all have ended or time is up."""
    deadline = time.monotonic() + options.timeout_s
    left, passed = dict(jobs), set()
    while left and time.monotonic() < deadline:
        for node, name in list(left.items()):
            job = cluster.get(JOB, name, spec.namespace)
            if job is None or reasons.condition(job, "Failed") == "True":
                why = "its Job was deleted" if job is None else _why(cluster, spec, name, job)
                progress.tell("error", f"node {node}: {why}", node=node)
                del left[node]
            elif reasons.condition(job, "Complete") == "True":
                passed.add(node)
                progress.tell("passed", f"node {node}: its GPUs are well", node=node)
                del left[node]
        if left:
            progress.standing({f"node {node}": "is being tested" for node in left}, [])
            time.sleep(options.poll_s)
    for node in left:
        progress.tell("error", f"node {node}: no end in time", node=node)
    return passed


def _why(cluster: Cluster, spec: ServingSpec, name: str, job: Object) -> str:
    """What the test said last, which the kubelet keeps as the container's message."""
    pods = cluster.select(POD, spec.namespace, labels=f"job-name={name}").items
    for pod in pods:
        for status in (pod.get("status") or {}).get("containerStatuses") or []:
            if message := ((status.get("state") or {}).get("terminated") or {}).get("message"):
                return " ".join(str(message).split())[:500]
    return "; ".join(reason.text for reason in reasons.of_job(job))


def _clear(cluster: Cluster, name: str, options: Options, progress: Progress) -> None:
    """Take the taint away, from the node as it is by then."""
    doomed = {UNVERIFIED, FAULT} if options.clears_faults else {UNVERIFIED}
    for _ in range(MAX_CONFLICTS):
        node = cluster.get(NODE, name)
        if node is None:
            return
        taints = (node.get("spec") or {}).get("taints") or []
        kept = [taint for taint in taints if taint["key"] not in doomed]
        if kept == taints:
            return
        body = {"metadata": {"resourceVersion": node["metadata"]["resourceVersion"]}, "spec": {"taints": kept}}
        try:
            cluster.patch(NODE, name, "", body)
        except ApiError as error:
            if error.status == 409:
                continue
            if error.is_forbidden:
                progress.tell("warning", f"node {name}: its taint stays, for it needs patch on nodes")
                return
            raise
        progress.tell("cleared", f"node {name}: takes work", node=name)
        return
    raise ToolError(f"node {name}: changed by others {MAX_CONFLICTS} times in a row")


def _has_taint(node: Object, key: str) -> bool:
    return any(taint["key"] == key for taint in (node.get("spec") or {}).get("taints") or [])
