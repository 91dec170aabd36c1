"""What every pod and container has."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k8s.amounts import MI, num_bytes_of
from k8s.objects import BALLOON, GATEWAY, GPU_HEALTH, HEAD, WORKER
from k8s.yaml_text import content_hash
from tests.k8s.invariants import invariant
from tests.k8s.invariants_of_capacity import gpus_of
from tests.k8s.manifests import Manifests

RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True}
NCCL_MI = 512
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
VOLUMES |= {"image"}  # since Kubernetes 1.33 (kubernetes #130394)
"""What the `restricted` profile lets a pod mount."""


@invariant(
    lambda m: m.container(GATEWAY)["resources"].pop("requests"),
    lambda m: m.container(WORKER)["resources"]["limits"].pop("memory"),
    lambda m: m.container(WORKER)["resources"]["limits"].update({"nvidia.com/gpu": "4"}),
    lambda m: m.container(WORKER)["resources"]["requests"].pop("nvidia.com/gpu"),
    lambda m: m.container(BALLOON)["resources"]["requests"].update(memory="1Gi"),
    lambda m: m.ray["autoscalerOptions"].pop("resources"),
)
def containers_say_what_they_need(m: Manifests) -> Iterator[str]:
    gpu = m.spec.cluster.gpu_resource
    found = [(pod.owner, container) for pod in m.pods() for container in pod.containers()]
    if m.ray["enableInTreeAutoscaling"]:
        found.append(("autoscaler", {"name": "autoscaler", **m.ray["autoscalerOptions"]}))
    for owner, container in found:
        resources = container.get("resources", {})
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for name, kind in (("cpu", requests), ("memory", requests), ("memory", limits)):
            if name not in kind:
                yield f"{owner}/{container['name']}: says nothing of {name}"
        if requests.get("memory") != limits.get("memory"):
            yield f"{owner}/{container['name']}: memory that is promised to others"
        if requests.get(gpu) != limits.get(gpu):
            yield f"{owner}/{container['name']}: GPUs requested and limited differ"


@invariant(
    lambda m: m.container(WORKER).pop("securityContext"),
    lambda m: m.container(GATEWAY)["securityContext"].update(readOnlyRootFilesystem=False),
    lambda m: m.container(HEAD)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    lambda m: m.pod(WORKER).spec["initContainers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
    lambda m: m.pod(GPU_HEALTH).spec["securityContext"].pop("seccompProfile"),
    lambda m: m.pod(GPU_HEALTH).spec["securityContext"].update(runAsUser=0),
    lambda m: m.pod(WORKER).spec.update(hostNetwork=True),
    lambda m: m.pod(WORKER).spec["volumes"].append({"name": "x", "hostPath": {"path": "/dev/shm"}}),
    lambda m: m.ray["autoscalerOptions"].pop("securityContext"),
    lambda m: m.of_kind("Namespace")[0]["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
)
def pods_are_restricted(m: Manifests) -> Iterator[str]:
    [namespace] = m.of_kind("Namespace")
    for mode in ("audit", "enforce", "warn"):
        if namespace["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != "restricted":
            yield f"the namespace does not {mode} the restricted profile"
    containers = [(pod.owner, container) for pod in m.pods() for container in pod.containers()]
    if m.ray["enableInTreeAutoscaling"]:
        containers.append(("RayService", {"name": "autoscaler", **m.ray["autoscalerOptions"]}))
    for owner, container in containers:
        context = container.get("securityContext", {})
        if {key: context.get(key) for key in RESTRICTED} != RESTRICTED:
            yield f"{owner}/{container['name']}: {context}"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{owner}/{container['name']}: has capabilities"
    for pod in m.pods():
        context = pod.spec["securityContext"]
        if context.get("seccompProfile") != {"type": "RuntimeDefault"} or not context.get("runAsUser", 0) > 0:
            yield f"{pod.owner}: {context}"
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.owner}: shares a namespace with its host"
        kinds = {kind for volume in pod.spec.get("volumes", []) for kind in volume if kind != "name"}
        if kinds - VOLUMES:
            yield f"{pod.owner}: mounts {', '.join(sorted(kinds - VOLUMES))}"


@invariant(
    lambda m: m.container(GATEWAY).update(image="argosy-gateway:latest"),
    lambda m: m.container(GATEWAY).update(image="argosy-gateway"),
    lambda m: m.container(WORKER).update(image="registry.invalid/argosy/engine:0.1.0"),
    lambda m: m.pod(WORKER).spec["initContainers"][0].update(image="busybox:1"),
)
def images_are_named_exactly(m: Manifests) -> Iterator[str]:
    for pod in m.pods():
        images = {container["name"]: container["image"] for container in pod.containers()}
        images |= {v["name"]: v["image"]["reference"] for v in pod.spec.get("volumes", []) if "image" in v}
        for name, image in images.items():
            tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
            digest = re.search(r"@sha256:[0-9a-f]{64}$", image)
            if tag == "latest" or not (tag or digest):
                yield f"{pod.owner}/{name}: {image} may be anything"
            if m.spec.is_prod and not digest:
                yield f"{pod.owner}/{name}: {image} names no digest"


@invariant(
    lambda m: m.pod(WORKER).spec["volumes"][0]["emptyDir"].update(sizeLimit="64Mi"),
    lambda m: m.pod(WORKER).spec["volumes"][0]["emptyDir"].pop("medium"),
    lambda m: m.container(WORKER)["volumeMounts"].pop(0),
)
def shared_memory_is_large_enough(m: Manifests) -> Iterator[str]:
    for pod in m.pods():
        if not pod.owner.startswith("RayService/"):
            continue
        gpus = gpus_of(m, pod)
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0]["volumeMounts"]}
        [volume] = [v for v in pod.spec["volumes"] if v["name"] == mounts.get("/dev/shm")] or [{"emptyDir": {}}]
        size = num_bytes_of(volume["emptyDir"].get("sizeLimit", "64Mi"))
        needed = (NCCL_MI * gpus if gpus > 1 else 64) * MI
        if size < needed or volume["emptyDir"].get("medium") != "Memory":
            yield f"{pod.owner}: /dev/shm of {size / MI:.0f} MiB < {needed / MI:.0f} MiB in memory"
        memory = num_bytes_of(pod.spec["containers"][0]["resources"]["limits"]["memory"])
        if memory < 2 * size and memory < size + num_bytes_of("2Gi"):
            yield f"{pod.owner}: /dev/shm counts as memory and leaves nothing of {memory / MI:.0f} MiB"


@invariant(
    lambda m: m.pod(GATEWAY).spec.update(automountServiceAccountToken=True),
    lambda m: m.pod(WORKER).spec.pop("automountServiceAccountToken"),
    lambda m: m.pod(GATEWAY).spec.pop("enableServiceLinks"),
    lambda m: m.of_kind("ServiceAccount")[0].pop("automountServiceAccountToken"),
)
def only_who_asks_the_api_server_has_a_token(m: Manifests) -> Iterator[str]:
    allowed = {GPU_HEALTH} | ({HEAD} if m.ray["enableInTreeAutoscaling"] else set())
    for pod in m.pods():
        if pod.spec.get("automountServiceAccountToken", True) != (pod.component in allowed):
            yield f"{pod.owner}: a token it does not need, or none that it needs"
        if pod.spec.get("enableServiceLinks", True):
            yield f"{pod.owner}: a variable for every Service of the namespace"
    for account in m.of_kind("ServiceAccount"):
        if account.get("automountServiceAccountToken", True):
            yield f"{account['metadata']['name']}: hands its token to every pod"


@invariant(
    lambda m: m.settings_map["metadata"].update(name="argosy-gateway-settings"),
    lambda m: m.settings_map.pop("immutable"),
    lambda m: m.alter_settings(max_queue_len=1),
)
def settings_change_by_name(m: Manifests) -> Iterator[str]:
    """A pod that restarts finds what its siblings have, and a change is a rollout."""
    for thing in m.of_kind("ConfigMap"):
        name = thing["metadata"]["name"]
        if "grafana_dashboard" in thing["metadata"]["labels"]:
            continue
        if not thing.get("immutable") or not name.endswith("-" + content_hash(thing["data"])):
            yield f"ConfigMap {name}: its name does not change with its content"


@invariant(
    lambda m: m.pod(BALLOON).spec.update(priorityClassName="argosy-serving"),
    lambda m: m.one("PriorityClass", "head").update(value=1),
    lambda m: m.one("PriorityClass", "balloon").update(preemptionPolicy="PreemptLowerPriority"),
    lambda m: m.one("PriorityClass", "serving").update(globalDefault=True),
    lambda m: m.pod(BALLOON).spec.update(terminationGracePeriodSeconds=30),
)
def priorities_are_in_order(m: Manifests) -> Iterator[str]:
    order = ["head", "gateway", "serving", "batch", "balloon"]
    values = [m.one("PriorityClass", kind)["value"] for kind in order]
    if values != sorted(values, reverse=True) or len(set(values)) != len(values) or values[-1] >= 0:
        yield f"priorities {dict(zip(order, values, strict=True))}"
    if any(thing["globalDefault"] for thing in m.of_kind("PriorityClass")):
        yield "pods of others get a priority of ours"
    if m.one("PriorityClass", "balloon")["preemptionPolicy"] != "Never":
        yield "a balloon that pushes others away"
    wanted = {HEAD: "head", GATEWAY: "gateway", WORKER: "serving", BALLOON: "balloon"}
    for pod in m.pods():
        kind = wanted.get(pod.component)
        if kind and pod.spec["priorityClassName"] != f"{m.spec.name}-{kind}":
            yield f"{pod.owner}: priority {pod.spec['priorityClassName']}"
        if pod.component == BALLOON and pod.spec["terminationGracePeriodSeconds"] != 0:
            yield f"{pod.owner}: a replica waits for a balloon"
