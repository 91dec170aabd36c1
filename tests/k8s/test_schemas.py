"""Every object against its schema: core kinds as kubernetes-validate knows them, custom ones as their CRDs do."""

from __future__ import annotations

import copy
import functools
import json

import kubernetes_validate
import pytest
import yaml

from k8s.objects import Object
from tests.k8s import crds
from tests.k8s.manifests import CRDS, OVERLAYS, ROOT, manifests
from tests.k8s.optional import OPTIONAL

KUBERNETES = "1.36"  # what the manifests are for
CUSTOM = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/", "keda.sh/")
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no schemas of custom resources in {CRDS}")


def is_custom(thing: Object) -> bool:
    return thing["apiVersion"].startswith(CUSTOM)


@functools.cache
def every_object() -> list[Object]:
    """Of all overlays and optional specs, each once."""
    things = (thing for name in (*OVERLAYS, *OPTIONAL) for thing in manifests(name).objects.values())
    found = {json.dumps(thing, sort_keys=True): thing for thing in things}
    return list(found.values())


def refusal(thing: Object) -> str:
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


def test_core_objects_fit_their_schemas() -> None:
    core = [thing for thing in every_object() if not is_custom(thing)]
    assert len(core) > 60
    assert not [text for thing in core if (text := refusal(thing))]


def test_pods_inside_custom_resources_fit_the_schema_of_pods() -> None:
    """A CRD carries a copy of the pod's schema, of some version; this is the API server's own."""
    for name in (*OVERLAYS, *OPTIONAL):
        for pod in manifests(name).pods():
            thing = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod.spec}
            assert not refusal(thing), pod.owner


def test_an_unknown_field_and_a_wrong_type_are_refused() -> None:
    deployment = manifests("dev-cpu").one("Deployment", "gateway")
    for path, value in ((("spec", "replica"), 1), (("spec", "replicas"), "one"), (("metadata", "labels"), ["a"])):
        broken = copy.deepcopy(deployment)
        broken[path[0]][path[1]] = value
        assert refusal(broken)


@needs_crds
def test_custom_resources_fit_their_schemas() -> None:
    custom = [thing for thing in every_object() if is_custom(thing)]
    kinds = {"RayService", "ServiceMonitor", "PodMonitor", "PrometheusRule", "Gateway", "HTTPRoute", "ScaledObject"}
    assert {thing["kind"] for thing in custom} == kinds
    assert not [(thing["kind"], text) for thing in custom for text in crds.complaints(thing)]


@needs_crds
def test_custom_resources_are_checked_strictly_and_by_their_rules() -> None:
    good = manifests("prod-h100-tp8").one("RayService")
    for path, value, words in (
        ("spec.serveConfigV3", "", "serveConfigV3"),
        ("spec.rayClusterConfig.headGroupSpec.template.spec.tolerance", [], "tolerance"),
        ("spec.rayClusterConfig.gcsFaultToleranceOptions.backend", "etcd", "etcd"),
        ("spec.rayClusterConfig.autoscalerOptions.version", "v3", "v3"),
        ("spec.rayClusterDeletionDelaySeconds", "60", "not of type"),
        ("spec.rayClusterConfig.workerGroupSpecs", [{"groupName": "x"}], "required"),
        ("spec.managedBy", "me", "must be either"),
    ):
        broken = copy.deepcopy(good)
        *parents, last = path.split(".")
        functools.reduce(lambda thing, key: thing[key], parents, broken)[last] = value
        assert any(words in text for text in crds.complaints(broken)), path


@needs_crds
@pytest.mark.parametrize(
    ("rule", "value", "is_true"),
    [
        ("self in ['a', 'b']", "b", True),
        ("self in ['a', 'b']", "c", False),
        ("!has(self.x) || self.x > 2", {"x": 1}, False),
        ("!has(self.x) || self.x > 2", {"y": 1}, True),
        ("self.all(i, i.name != '')", [{"name": "a"}, {"name": ""}], False),
    ],
)
def test_rules_are_evaluated(rule: str, value: object, is_true: bool) -> None:
    assert crds.holds(rule, value) is is_true


def test_what_kustomize_reads_is_valid_yaml_of_one_object_each() -> None:
    for path in sorted((ROOT / "k8s" / "base").rglob("*.yaml")):
        if path.name in ("kustomization.yaml", "spec.yaml", "argosy.rules.yaml"):
            continue
        [thing] = yaml.safe_load_all(path.read_text(encoding="utf-8"))
        assert {"apiVersion", "kind", "metadata"} <= thing.keys(), path
