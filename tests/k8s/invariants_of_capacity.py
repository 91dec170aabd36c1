"""GPUs, hosts, replicas, budgets, quota, and where pods may go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from k8s.objects import BALLOON, GATEWAY, GPU_HEALTH, HEAD, WORKER, Object
from tests.k8s.invariants import invariant
from tests.k8s.manifests import Manifests, Pod, selects

RAY_VERSION = "2.60.0"
GENERATIONS = {"Deployment": "pod-template-hash", "RayService": "ray.io/cluster"}


@dataclasses.dataclass(frozen=True)
class Scaler:
    """A HorizontalPodAutoscaler, or the one that KEDA makes of a ScaledObject."""

    target: Object
    fewest: int
    most: int
    behavior: Object


def scalers(m: Manifests) -> list[Scaler]:
    found = []
    for thing in m.of_kind("HorizontalPodAutoscaler"):
        spec = thing["spec"]
        found.append(Scaler(spec["scaleTargetRef"], spec["minReplicas"], spec["maxReplicas"], spec.get("behavior", {})))
    for thing in m.of_kind("ScaledObject"):
        spec = thing["spec"]
        behavior = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
        # Both counts have defaults of KEDA's, 0 and 100.
        fewest, most = spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
        found.append(Scaler(spec["scaleTargetRef"], fewest, most, behavior))
    return found


def gpus_of(m: Manifests, pod: Pod) -> int:
    """By its containers' limits, and by the claims that they name."""
    claims = {claim["name"]: claim["resourceClaimTemplateName"] for claim in pod.spec.get("resourceClaims", [])}
    resources = [container["resources"] for container in pod.containers(init=False)]
    named = [claims[claim["name"]] for asked in resources for claim in asked.get("claims", [])]
    limited = sum(int(asked["limits"].get(m.spec.cluster.gpu_resource, 0)) for asked in resources)
    return limited + sum(devices_of(m, name) for name in named)


def devices_of(m: Manifests, template: str) -> int:
    """Devices of one claim that is made from a template."""
    [found] = [thing for thing in m.of_kind("ResourceClaimTemplate") if thing["metadata"]["name"] == template]
    return sum(request["exactly"]["count"] for request in found["spec"]["spec"]["devices"]["requests"])


def max_replicas(m: Manifests) -> int:
    scaled = m.replica.get("autoscaling_config")
    return int(scaled["max_replicas"] if scaled else m.replica["num_replicas"])


def _set_replica(m: Manifests, **values: Any) -> None:
    m.alter_serve(lambda document: document["applications"][1]["deployments"][0].update(values))


def _set_engine(m: Manifests, **values: Any) -> None:
    m.alter_serve(lambda document: document["applications"][1]["args"]["engine"].update(values))


@invariant(
    lambda m: m.workers.update(maxReplicas=3),
    lambda m: m.workers.update(numOfHosts=0),
    lambda m: m.container(WORKER)["resources"]["limits"].update({"nvidia.com/gpu": "4"}),
    lambda m: m.workers["rayStartParams"].update({"num-gpus": "4"}),
    lambda m: m.workers["rayStartParams"].update({"num-cpus": "16"}),
    lambda m: _set_replica(m, placement_group_bundles=[{"CPU": 1, "GPU": 1}]),
    lambda m: _set_engine(m, tensor_parallel_size=4),
)
def ranks_find_their_gpus(m: Manifests) -> Iterator[str]:
    engine = m.serve["applications"][1]["args"]["engine"]
    num_ranks = engine["tensor_parallel_size"] * engine["pipeline_parallel_size"]
    group, pod = m.workers, m.pod(WORKER)
    pods = group["maxReplicas"] * group["numOfHosts"]
    if engine["device"] == "cuda" and num_ranks * max_replicas(m) > pods * gpus_of(m, pod):
        yield f"{num_ranks} ranks x {max_replicas(m)} replicas > {pods} pods x {gpus_of(m, pod)} GPUs"
    if int(group["rayStartParams"]["num-gpus"]) != gpus_of(m, pod):
        yield f"Ray counts {group['rayStartParams']['num-gpus']} GPUs, the pod has {gpus_of(m, pod)}"
    bundles = m.replica.get("placement_group_bundles", [m.replica["ray_actor_options"]])
    if len(bundles) != num_ranks:
        yield f"{len(bundles)} bundles for {num_ranks} ranks"
    cpus = sum(bundle.get("CPU", bundle.get("num_cpus", 0)) for bundle in bundles)
    if cpus > int(group["rayStartParams"]["num-cpus"]) * group["numOfHosts"]:
        yield f"bundles of {cpus} CPUs on workers with {group['rayStartParams']['num-cpus']}"


@invariant(
    lambda m: m.one("ResourceQuota", "quota")["spec"]["hard"].update({"requests.nvidia.com/gpu": "8"}),
    lambda m: m.one("ResourceQuota", "quota")["spec"]["hard"].update(pods="3"),
    lambda m: m.workers.update(maxReplicas=100),
    lambda m: m.one("HorizontalPodAutoscaler", "gateway")["spec"].update(maxReplicas=1000),
)
def quota_has_room_for_the_most(m: Manifests) -> Iterator[str]:
    hard = m.one("ResourceQuota", "quota")["spec"]["hard"]
    most = {pod.owner: pod.count for pod in m.pods()}
    for scaler in scalers(m):
        most[f"Deployment/{scaler.target['name']}"] = scaler.most
    if sum(most.values()) > int(hard["pods"]):
        yield f"{sum(most.values())} pods > quota {hard['pods']}"
    gpus = sum(gpus_of(m, pod) * most[pod.owner] for pod in m.pods())
    claimed = f"{m.spec.cluster.device_class}.deviceclass.resource.k8s.io/devices"
    if m.spec.has("dra") and gpus > int(hard.get(claimed, 0)):
        yield f"{gpus} GPUs > quota {hard.get(claimed, 0)} of claims"
    if gpus > int(hard.get(f"requests.{m.spec.cluster.gpu_resource}", 0)):
        yield f"{gpus} GPUs > quota {hard.get(f'requests.{m.spec.cluster.gpu_resource}', 0)}"


@invariant(
    lambda m: m.one("PodDisruptionBudget", "gateway")["spec"].update(maxUnavailable=0),
    lambda m: (
        m.one("PodDisruptionBudget", "gateway")["spec"].pop("maxUnavailable"),
        m.one("PodDisruptionBudget", "gateway")["spec"].update(minAvailable=3),
    ),
    lambda m: (
        m.one("PodDisruptionBudget", "worker")["spec"].pop("minAvailable"),
        m.one("PodDisruptionBudget", "worker")["spec"].update(maxUnavailable=1),
    ),
    lambda m: m.one("PodDisruptionBudget", "worker")["spec"].update(minAvailable=2),
    lambda m: m.one("PodDisruptionBudget", "head")["spec"].update(minAvailable=1),
    lambda m: m.one("PodDisruptionBudget", "head")["spec"].update(unhealthyPodEvictionPolicy="IfHealthyBudget"),
    lambda m: m.one("PodDisruptionBudget", "worker")["spec"]["selector"]["matchLabels"].clear(),
)
def budgets_never_block_for_ever(m: Manifests) -> Iterator[str]:
    """Of a pod whose owner has no scale subresource only a number in minAvailable can be kept: with anything else
    the disruption controller fails, and allows nothing."""
    fewest = {HEAD: 1, WORKER: m.workers["minReplicas"] * m.workers["numOfHosts"]}
    fewest[GATEWAY] = m.spec.gateway.min_replicas
    covered = set()
    for budget in m.of_kind("PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        pods = [pod for pod in m.pods() if selects(spec["selector"], pod.labels)]
        if len(pods) != 1:
            yield f"{name}: covers {', '.join(pod.owner for pod in pods)}"
            continue
        component = pods[0].component
        covered.add(component)
        if pods[0].owner.startswith("RayService/") and not isinstance(spec.get("minAvailable"), int):
            yield f"{name}: a RayCluster tells nobody its scale, only a number in minAvailable works"
        elif isinstance(spec.get("minAvailable"), int) and spec["minAvailable"] >= max(1, fewest[component]):
            yield f"{name}: {spec['minAvailable']} of {fewest[component]} pods stay: no node can be drained"
        elif spec.get("maxUnavailable", 1) in (0, "0%"):
            yield f"{name}: no node with its pods can ever be drained"
        if component == WORKER and spec.get("minAvailable", 0) % m.workers["numOfHosts"]:
            yield f"{name}: {spec['minAvailable']} is no whole number of replicas of {m.workers['numOfHosts']} hosts"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{name}: a broken pod blocks its node"
    for component in (GATEWAY, HEAD, WORKER):
        if component not in covered:
            yield f"no budget for {component}"


@invariant(
    lambda m: m.pod(HEAD).spec.pop("affinity"),
    lambda m: m.pod(GATEWAY).spec.update(tolerations=[{"operator": "Exists"}]),
    lambda m: m.pod(WORKER).spec.pop("tolerations"),
    lambda m: m.pod(WORKER).spec["tolerations"].append({"key": "argosy/gpu-unverified", "operator": "Exists"}),
    lambda m: m.pod(WORKER).spec.pop("nodeSelector"),
    lambda m: m.pod(BALLOON).spec.pop("tolerations"),
)
def gpu_nodes_are_for_gpu_pods(m: Manifests) -> Iterator[str]:
    gpu, label = m.spec.cluster.gpu_resource, m.spec.cluster.gpu_node_label
    for pod in m.pods():
        keys = {toleration.get("key") for toleration in pod.spec.get("tolerations", [])}
        if gpus_of(m, pod):
            if keys != {gpu}:
                yield f"{pod.owner}: tolerates {keys}, not just {gpu}"
            if pod.spec.get("nodeSelector", {}).get(label) != "true":
                yield f"{pod.owner}: is not sent to nodes with GPUs"
        elif pod.component != GPU_HEALTH and keys & {gpu, None}:
            yield f"{pod.owner}: may take the place of a GPU pod"
    required = m.pod(HEAD).spec.get("affinity", {}).get("nodeAffinity", {})
    terms = required.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    wanted = {"key": label, "operator": "DoesNotExist"}
    if not terms or any(wanted not in term.get("matchExpressions", []) for term in terms):
        yield "the head may land on a node with GPUs"


@invariant(
    lambda m: m.pod(GATEWAY).spec["topologySpreadConstraints"][0].pop("matchLabelKeys"),
    lambda m: m.pod(GATEWAY).spec["topologySpreadConstraints"].pop(0),
    lambda m: (
        m.pod(WORKER)
        .spec["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
        .update({"app.kubernetes.io/component": GATEWAY})
    ),
    lambda m: m.pod(WORKER).spec["topologySpreadConstraints"][0].update(matchLabelKeys=["pod-template-hash"]),
)
def pods_spread_within_their_generation(m: Manifests) -> Iterator[str]:
    for pod in m.pods():
        for constraint in pod.spec.get("topologySpreadConstraints", []):
            if constraint.get("matchLabelKeys") != [GENERATIONS[pod.owner.partition("/")[0]]]:
                yield f"{pod.owner}: an old rollout's pods count for a new one"
            if not selects(constraint["labelSelector"], pod.labels):
                yield f"{pod.owner}: spreads other pods than itself"
    keys = {(c["topologyKey"], c["whenUnsatisfiable"]) for c in m.pod(GATEWAY).spec["topologySpreadConstraints"]}
    if "kubernetes.io/hostname" not in {key for key, _ in keys}:
        yield "gateways may all be on one host"
    if m.spec.is_prod and ("topology.kubernetes.io/zone", "DoNotSchedule") not in keys:
        yield "gateways may all be in one zone"


@invariant(
    lambda m: m.ray["headGroupSpec"]["rayStartParams"].update({"num-cpus": "4"}),
    lambda m: m.service.update(excludeHeadPodFromServeSvc=False),
    lambda m: m.ray.update(rayVersion="2.50.0"),
    lambda m: m.ray.pop("gcsFaultToleranceOptions"),
    lambda m: m.ray.pop("authOptions"),
    lambda m: m.service.update(serviceUnhealthySecondThreshold=600),
    lambda m: m.ray["headGroupSpec"].update(serviceType="LoadBalancer"),
)
def the_head_only_controls(m: Manifests) -> Iterator[str]:
    head = m.ray["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0" or head["rayStartParams"].get("num-gpus") != "0":
        yield "work may be placed on the head"
    if not m.service.get("excludeHeadPodFromServeSvc"):
        yield "the head is in the Service of Serve's proxies"
    if m.ray["rayVersion"] != RAY_VERSION:
        yield f"Ray {m.ray['rayVersion']}: before 2.60 a SIGTERM kills replicas under live proxies"
    if m.spec.is_prod and m.ray.get("gcsFaultToleranceOptions", {}).get("backend") != "rocksdb":
        yield "a lost head is a lost cluster"
    if m.ray.get("authOptions", {}).get("mode") != "token":
        yield "whoever reaches Ray may run code in it"
    for field in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
        if field in m.service:
            yield f"{field} rebuilds the cluster while nodes come up"
    if head["serviceType"] != "ClusterIP":
        yield "Ray is reachable from outside"


@invariant(
    lambda m: m.ray.update(enableInTreeAutoscaling=False),
    lambda m: _set_replica(m, num_replicas=2),
    lambda m: m.replica["autoscaling_config"] and _set_replica(m, autoscaling_config={"min_replicas": 1}),
    lambda m: m.workers.update(minReplicas=0),
    lambda m: m.ray["autoscalerOptions"].update(version="v1"),
    lambda m: m.workers.update(idleTimeoutSeconds=10),
    lambda m: m.alter_settings(min_replicas=0),
)
def one_policy_decides_how_many(m: Manifests) -> Iterator[str]:
    scaled = m.replica.get("autoscaling_config")
    if bool(scaled) != m.ray["enableInTreeAutoscaling"]:
        yield "Serve scales and Ray does not, or the other way round"
    if scaled is None:
        if m.workers["minReplicas"] != m.replica["num_replicas"]:
            yield f"{m.workers['minReplicas']} groups of pods for {m.replica['num_replicas']} replicas"
        return
    if "num_replicas" in m.replica:
        yield "num_replicas and autoscaling_config exclude each other"
    wanted = {"upscale_delay_s": 0.0, "metrics_interval_s": 1.0, "look_back_period_s": 5.0}
    if {key: scaled.get(key) for key in wanted} != wanted:
        yield f"a decision takes longer than 3 s: {scaled}"
    if "policy_function" not in scaled.get("policy", {}):
        yield "Serve's own policy counts requests that it does not see"
    if scaled.get("min_replicas") != m.workers["minReplicas"]:
        yield f"{m.workers['minReplicas']} groups of pods for {scaled.get('min_replicas')} replicas"
    if m.settings.get("min_replicas") != scaled.get("min_replicas"):
        yield "gateways do not know whether a request may wait for the first replica"
    if m.ray.get("autoscalerOptions", {}).get("version") != "v2":
        yield "the old autoscaler"
    if m.workers.get("idleTimeoutSeconds", 60) < 60:
        yield "pods leave before the next replica can use them"


@invariant(
    lambda m: m.one("Deployment", "gateway")["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
    lambda m: m.one("Deployment", "gateway")["spec"].update(replicas=3),
    lambda m: m.one("HorizontalPodAutoscaler", "gateway")["spec"].update(minReplicas=1),
    lambda m: m.one("HorizontalPodAutoscaler", "gateway")["spec"].pop("behavior"),
)
def gateways_are_never_fewer_than_needed(m: Manifests) -> Iterator[str]:
    gateway = m.one("Deployment", "gateway")["spec"]
    if gateway["strategy"].get("rollingUpdate", {}).get("maxUnavailable") != 0:
        yield "a rollout takes gateways away before it brings new ones"
    if bool(scalers(m)) == ("replicas" in gateway):
        yield "the Deployment and its autoscaler both write replicas, or neither does"
    for scaler in scalers(m):
        if m.spec.is_prod and scaler.fewest < 2:
            yield "one gateway is one node's failure away from none"
        if scaler.behavior.get("scaleDown", {}).get("stabilizationWindowSeconds", 0) < 300:
            yield "gateways leave at the first quiet moment"
