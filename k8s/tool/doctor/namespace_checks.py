"""Checks of the namespace: its policies, secrets, quotas, images, budgets, autoscalers and revisions."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from k8s.objects import engine_secret
from k8s.tool import reasons
from k8s.tool.doctor import facts as of
from k8s.tool.doctor.facts import Facts
from k8s.tool.doctor.table import ERROR, WARNING, Table
from k8s.tool.kinds import AUTOSCALER, BUDGET, QUOTA
from k8s.tool.quantities import number

TABLE = Table()
QUOTA_SHARE = 0.9
ENFORCE = "pod-security.kubernetes.io/enforce"
_HEX = re.compile(rb"\s*[0-9a-fA-F]{32,}(\s+[0-9a-fA-F]{32,})*\s*")


@TABLE.check("namespace", ERROR, "`argosy k8s deploy SPEC` makes it", of.NAMESPACES)
def namespace(facts: Facts) -> Iterator[str]:
    if facts.namespace is None:
        yield f"there is no namespace {facts.spec.namespace}"
    elif facts.namespace["metadata"].get("deletionTimestamp"):
        yield f"the namespace {facts.spec.namespace} is being deleted"


@TABLE.check("pod-security", WARNING, f"label the namespace {ENFORCE}=restricted, as base does", of.NAMESPACES)
def pod_security(facts: Facts) -> Iterator[str]:
    level = ((facts.namespace or {}).get("metadata") or {}).get("labels", {}).get(ENFORCE, "nothing")
    if facts.namespace is not None and level != "restricted":
        yield f"the namespace enforces {level} instead of restricted"


@TABLE.check(
    "named-namespaces", WARNING, "correct ingress_, monitoring_ and operator_namespace in the spec", of.NAMESPACES
)
def named_namespaces(facts: Facts) -> Iterator[str]:
    there = {found["metadata"]["name"] for found in facts.lists[of.NAMESPACES]}
    for key in ("ingress_namespace", "monitoring_namespace", "operator_namespace"):
        name = getattr(facts.spec.cluster, key)
        if name not in there:
            yield f"cluster.{key} is {name}, which does not exist: NetworkPolicies let nobody in from there"


@TABLE.check(
    "network-policies", WARNING, "`argosy k8s deploy SPEC`: without the default denial every pod is open", of.POLICIES
)
def network_policies(facts: Facts) -> Iterator[str]:
    names = {found["metadata"]["name"] for found in facts.lists[of.POLICIES]}
    if f"{facts.spec.name}-deny" not in names:
        yield f"there is no NetworkPolicy {facts.spec.name}-deny"


@TABLE.check(
    "engine-secret",
    ERROR,
    "`argosy k8s deploy SPEC` makes it; or a Secret whose key `secret` has hexadecimal lines",
    of.SECRETS,
)
def secret_of_engine(facts: Facts) -> Iterator[str]:
    name = engine_secret(facts.spec)
    found = facts.secrets.get(name)
    if found is None:
        yield f"there is no Secret {name}: no pod starts without it"
        return
    value = base64.b64decode((found.get("data") or {}).get("secret", ""))
    if not value:
        yield f"Secret {name} has no key `secret`"
    elif not _HEX.fullmatch(value) and not 16 <= len(value) <= 4096:
        yield f"Secret {name}: `secret` is neither hexadecimal lines of 32 digits nor 16 to 4,096 bytes"


@TABLE.check(
    "pull-secret", ERROR, "kubectl create secret docker-registry NAME ..., as images.pull_secret names it", of.SECRETS
)
def pull_secret(facts: Facts) -> Iterator[str]:
    name = facts.spec.images.pull_secret
    if name and facts.secrets.get(name) is None:
        yield f"there is no Secret {name}, with which images are pulled"


@TABLE.check("quota", WARNING, "raise the quota, or run less", QUOTA.name)
def quota(facts: Facts) -> Iterator[str]:
    for found in facts.fleet.items.get(QUOTA, []):
        used = (found.get("status") or {}).get("used") or {}
        for name, hard in (found["spec"].get("hard") or {}).items():
            most, now = number(hard), number(used.get(name, 0))
            if most and now and now >= QUOTA_SHARE * most:
                yield f"ResourceQuota {found['metadata']['name']}: {name} {used[name]} of {hard} used"


@TABLE.check("placeholder-images", ERROR, "build the images, push them, and put their digests into the spec")
def placeholder_images(facts: Facts) -> Iterator[str]:
    yield from (f"{image} is a place holder" for image in facts.spec.placeholder_images)


@TABLE.check("image-digests", WARNING, "name digests in the spec: a tag may be another image tomorrow", "Pod")
def image_digests(facts: Facts) -> Iterator[str]:
    if facts.spec.is_prod:
        pods = [pod["spec"] for pod in facts.fleet.pods()]
        images = {container["image"] for pod in pods for container in pod["containers"]}
        images |= {v["image"].get("reference", "") for pod in pods for v in pod.get("volumes") or [] if "image" in v}
        yield from (f"{image} runs without a digest" for image in sorted(images) if "@sha256:" not in image)


@TABLE.check(
    "pdb-deadlock", ERROR, "raise maxUnavailable, or the number of replicas: no node can be drained", BUDGET.name
)
def pdb_deadlock(facts: Facts) -> Iterator[str]:
    for found in facts.fleet.items.get(BUDGET, []):
        status = found.get("status") or {}
        expected, healthy = int(status.get("expectedPods") or 0), int(status.get("currentHealthy") or 0)
        if expected and healthy >= expected and int(status.get("desiredHealthy") or 0) >= expected:
            yield f"PodDisruptionBudget {found['metadata']['name']} never allows a disruption of its {expected} pods"


@TABLE.check("pdb-empty", WARNING, "correct its selector: it protects nothing", BUDGET.name)
def pdb_empty(facts: Facts) -> Iterator[str]:
    for found in facts.fleet.items.get(BUDGET, []):
        status = found.get("status") or {}
        # A budget of hosts that are scaled to zero is empty, too.
        is_idle = found["metadata"]["name"].endswith("-worker") and facts.spec.engine.min_replicas == 0
        if status.get("observedGeneration") and not status.get("expectedPods") and not is_idle:
            yield f"PodDisruptionBudget {found['metadata']['name']} selects no pod"


@TABLE.check("pdb-held", WARNING, "wait for the pods that are away; `argosy k8s status` says why they are", BUDGET.name)
def pdb_held(facts: Facts) -> Iterator[str]:
    for found in facts.fleet.items.get(BUDGET, []):
        status = found.get("status") or {}
        away = int(status.get("expectedPods") or 0) - int(status.get("currentHealthy") or 0)
        if away > 0 and not status.get("disruptionsAllowed"):
            yield f"PodDisruptionBudget {found['metadata']['name']} allows no more: {away} pods are away already"


@TABLE.check(
    "hpa-unknown",
    ERROR,
    "make its metric available: `kubectl describe hpa`, metrics-server, the adapter",
    AUTOSCALER.name,
)
def hpa_unknown(facts: Facts) -> Iterator[str]:
    for found in facts.fleet.items.get(AUTOSCALER, []):
        if reasons.condition(found, "ScalingActive") == "False":
            entries = found["status"]["conditions"]
            why = next(entry for entry in entries if entry["type"] == "ScalingActive")
            yield f"HorizontalPodAutoscaler {found['metadata']['name']} does not act: {why.get('message', '')}"


@TABLE.check("hpa-at-limit", WARNING, "raise gateway.max_replicas, if nodes and quota have room", AUTOSCALER.name)
def hpa_at_limit(facts: Facts) -> Iterator[str]:
    for found in facts.fleet.items.get(AUTOSCALER, []):
        most, status = found["spec"]["maxReplicas"], found.get("status") or {}
        if reasons.condition(found, "ScalingLimited") == "True" and status.get("desiredReplicas") == most:
            yield f"HorizontalPodAutoscaler {found['metadata']['name']} wants more than its {most} replicas"


@TABLE.check("revision", WARNING, "`argosy k8s deploy SPEC` again, or `argosy k8s rollback`", of.REVISIONS)
def revision(facts: Facts) -> Iterator[str]:
    if facts.revisions and facts.revisions[0].status != "good":
        newest = facts.revisions[0]
        yield f"revision {newest.number} of {newest.time} is {newest.status}: {newest.note}"
    if facts.fleet.service is not None and not facts.revisions:
        yield "no revision is kept: somebody else deployed this, and `rollback` has nothing to return to"
