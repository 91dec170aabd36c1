"""The component dra: what claims say, which devices they find, and that nobody counts them wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.k8s.invariants_of_capacity
import tests.k8s.invariants_of_pods  # noqa: F401  # they register what they hold
from k8s import deployment
from k8s.dra import DRIVER, selectors
from k8s.objects import WORKER, Object
from k8s.spec import read_spec
from k8s.tool import exits, reasons, status
from k8s.tool.diagnosis import CHECKS
from k8s.tool.doctor.facts import read_facts
from k8s.tool.doctor.table import UNKNOWN, examine
from k8s.tool.waves import waves
from tests.k8s import crds
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.invariants import INVARIANTS
from tests.k8s.manifests import Manifests, manifests, printed
from tests.k8s.operators import make_node, make_pod
from tests.k8s.optional import OPTIONAL, changed

__all__ = ["running", "world"]


def the_gpus_are_claimed(m: Manifests) -> Iterator[str]:
    """And nothing counts them a second time, or for another number than Ray does."""
    pod, group = m.pod(WORKER), m.workers
    resources = m.container(WORKER)["resources"]
    if resources.get("claims") != [{"name": "gpus"}]:
        yield f"the engine's container has the claims {resources.get('claims')}"
    counted = [name for amounts in (resources["limits"], resources["requests"]) for name in amounts if "/" in name]
    if counted:
        yield f"asks for {counted}, too"
    named = [(claim["name"], claim["resourceClaimTemplateName"]) for claim in pod.spec.get("resourceClaims", [])]
    templates = {thing["metadata"]["name"]: thing["spec"] for thing in m.of_kind("ResourceClaimTemplate")}
    if [name for name, _ in named] != ["gpus"] or {template for _, template in named} != templates.keys():
        yield f"the pod claims {named}, and there are the templates {sorted(templates)}"
        return
    [spec] = templates.values()
    [request] = spec["spec"]["devices"]["requests"]
    asked = request["exactly"]
    if asked["count"] != m.sizing.gpus_per_pod or asked["deviceClassName"] != m.spec.cluster.device_class:
        yield f"claims {asked['count']} of {asked['deviceClassName']}"
    if group["rayStartParams"].get("num-gpus") != str(asked["count"]):
        yield f"KubeRay finds no limit to count, and num-gpus is {group['rayStartParams'].get('num-gpus')}"
    for expression in (selector["cel"]["expression"] for selector in asked["selectors"]):
        if len(expression) > 10 << 10:
            yield "an expression is too long"
    hard = m.one("ResourceQuota", "quota")["spec"]["hard"]
    if int(hard.get(f"{asked['deviceClassName']}.deviceclass.resource.k8s.io/devices", 0)) != m.sizing.quota_gpus:
        yield f"no quota stops claims: {hard}"


@pytest.mark.parametrize("name", ["dra", "dra-on-one-gpu", "dra-and-weights-image"])
def test_the_gpus_are_claimed(name: str) -> None:
    assert not list(the_gpus_are_claimed(manifests(name)))


def test_without_the_component_they_are_counted() -> None:
    spec = changed("single-gpu")
    assert len(list(the_gpus_are_claimed(Manifests(spec, printed(spec))))) >= 3


def _request(m: Manifests) -> Object:
    [template] = m.of_kind("ResourceClaimTemplate")
    request: Object = template["spec"]["spec"]["devices"]["requests"][0]["exactly"]
    return request


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: m.container(WORKER)["resources"].pop("claims"),
        lambda m: m.container(WORKER)["resources"]["limits"].update({"nvidia.com/gpu": "8"}),
        lambda m: m.pod(WORKER).spec.pop("resourceClaims"),
        lambda m: m.pod(WORKER).spec["resourceClaims"][0].update(resourceClaimTemplateName="argosy-gpus-00000000"),
        lambda m: _request(m).update(count=4),
        lambda m: _request(m).update(deviceClassName="mig.nvidia.com"),
        lambda m: m.workers["rayStartParams"].pop("num-gpus"),
        lambda m: m.one("ResourceQuota", "quota")["spec"]["hard"].pop(DEVICES),
    ],
)
def test_a_broken_claim_is_noticed(break_it: Callable[[Manifests], object]) -> None:
    m = manifests("dra")
    break_it(m)
    assert list(the_gpus_are_claimed(m))


DEVICES = "gpu.nvidia.com.deviceclass.resource.k8s.io/devices"
INVARIANTS_OF_CLAIMS: dict[str, Callable[[Manifests], object]] = {
    "ranks_find_their_gpus": lambda m: _request(m).update(count=4),
    "quota_has_room_for_the_most": lambda m: m.one("ResourceQuota", "quota")["spec"]["hard"].update({DEVICES: "8"}),
    "gpu_nodes_are_for_gpu_pods": lambda m: m.pod(WORKER).spec.pop("tolerations"),
    "shared_memory_is_large_enough": lambda m: m.pod(WORKER).spec["volumes"][0]["emptyDir"].update(sizeLimit="1Gi"),
}


@pytest.mark.parametrize("name", INVARIANTS_OF_CLAIMS)
def test_invariants_of_gpus_count_claims(name: str) -> None:
    [invariant] = [invariant for invariant in INVARIANTS if invariant.name == name]
    m = manifests("dra")
    assert not list(invariant.check(m))
    INVARIANTS_OF_CLAIMS[name](m)
    assert list(invariant.check(m))


def test_rays_autoscaler_counts_what_is_claimed() -> None:
    """Of a group without limits on GPUs it knows what rayStartParams say, and without those nothing."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _node_type_from_group_spec

    group = manifests("dra").workers
    assert _node_type_from_group_spec(group, is_head=False)["resources"]["GPU"] == 8
    del group["rayStartParams"]["num-gpus"]
    assert "GPU" not in _node_type_from_group_spec(group, is_head=False)["resources"]


H100 = "NVIDIA H100 80GB HBM3"


def device(product: str = H100, memory: int = 81_559 << 20, *, driver: str = DRIVER) -> Object:
    """As the scheduler shows one to CEL: NVIDIA's, with the attributes of its driver, or somebody else's."""
    attributes = {"type": "gpu", "productName": product} if driver == DRIVER else {"model": product}
    return {"driver": driver, "attributes": {driver: attributes}, "capacity": {driver: {"memory": memory}}}


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        (device(), True),
        (device(memory=80 * 10**9), True),
        (device("NVIDIA-H100-80GB-HBM3"), True),
        (device(memory=80 * 10**9 - 1), False),
        (device("NVIDIA H100 PCIe"), False),
        (device("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), False),
        (device("NVIDIA A100-SXM4-80GB"), False),
        (device(driver="gpu.example.com"), False),
        ({"driver": DRIVER, "attributes": {DRIVER: {"type": "gpu"}}, "capacity": {DRIVER: {}}}, False),
    ],
)
def test_a_claim_finds_the_devices_that_fit(found: Object, fits: bool) -> None:
    expressions = [selector["cel"]["expression"] for selector in _request(manifests("dra"))["selectors"]]
    assert len(expressions) == 2
    assert all(crds.selects_device(expression, found) for expression in expressions) is fits


def test_a_name_of_a_product_is_no_pattern() -> None:
    spec = OPTIONAL["dra"]()
    spec = dataclasses.replace(spec, cluster=dataclasses.replace(spec.cluster, gpu_product="NVIDIA-X.1"))
    product = selectors(spec)[1]
    assert crds.selects_device(product, device("NVIDIA X.1"))
    assert not crds.selects_device(product, device("NVIDIA Xa1"))
    assert len(selectors(dataclasses.replace(spec, cluster=dataclasses.replace(spec.cluster, gpu_product="")))) == 1


# --- dra and the tool ---------------------------------------------------------------------------


def claiming(world: World, **changes: object) -> str:
    path = world.spec_file("single-gpu", components=["dra"], **changes)
    for name in ("gpu-1", "gpu-2"):  # as device plugins count: four times what a replica needs
        world.running.put(make_node(name, gpus=2))
    return path


def test_capacity_and_preflight_refuse_to_count_claims(world: World) -> None:
    path = claiming(world)
    code, text = world.run("capacity", path)
    assert code == exits.ERROR and "capacity is not known: with the component dra GPUs are claimed" in text
    code, text = world.run("preflight", path)
    assert code == exits.REFUSED and "allocatable" in text and not world.running.all("Job")


def test_a_plan_says_that_it_cannot_know_and_what_the_quota_forbids(world: World) -> None:
    path = claiming(world)
    code, plan = world.run_json("plan", path)
    assert (plan["gpus"]["now"], plan["gpus"]["during"], plan["gpus"]["fitting_replicas"]) == (None, None, None)
    assert plan["gpus"]["after"] == 1 and "claimed" in plan["gpus"]["unknown"]
    assert code == exits.CHANGES and not plan["refusals"]
    assert any("whether there is room is not known" in warning for warning in plan["warnings"])
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team", "namespace": "argosy"}}
    world.running.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argosy"}})
    world.running.put({**quota, "spec": {"hard": {DEVICES: "4"}}, "status": {"used": {DEVICES: "4"}}})
    code, plan = world.run_json("plan", path)
    assert code == exits.REFUSED
    assert any("team" in refusal and DEVICES in refusal for refusal in plan["refusals"])


def test_a_plan_away_from_claims_does_not_count_those_that_live(world: World) -> None:
    worker = {"app.kubernetes.io/instance": "argosy", "app.kubernetes.io/component": WORKER}
    spec = {"containers": [{"name": "c", "image": "i"}], "resourceClaims": [{"name": "gpus"}]}
    world.running.put(make_pod("w", "argosy", {"metadata": {"labels": worker}, "spec": spec}, node="node-1"))
    _, plan = world.run_json("plan", "single-gpu")
    assert plan["gpus"]["now"] is None and "claimed" in plan["gpus"]["unknown"]
    assert status._pod(world.running.all("Pod")[0])["gpus"] is None


def test_the_doctor_knows_nodes_with_gpus_by_their_label(world: World) -> None:
    spec = read_spec(Path(claiming(world)))
    world.running.put(make_node("bare", labels={"nvidia.com/gpu.present": "true"}, taints=[]))
    results = {found.check.name: found for found in examine(CHECKS, read_facts(world.cluster, spec))}
    assert results["gpu-allocatable"].outcome == UNKNOWN and "claimed" in results["gpu-allocatable"].texts[0]
    assert any("node bare has GPUs and no taint" in text for text in results["gpu-pods-elsewhere"].texts)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("0/2 nodes are available: 2 cannot allocate all claims.", "no node has enough of the devices"),
        ("request gpu: device class gpu.nvidia.com does not exist", "there is no DeviceClass gpu.nvidia.com:"),
    ],
)
def test_what_the_scheduler_says_of_claims_is_explained(said: str, means: str) -> None:
    assert means in reasons.explain_scheduling(said)


def test_a_claim_s_template_is_there_before_the_engine() -> None:
    things = list(deployment.objects(OPTIONAL["dra"]()).values())
    order = [thing["kind"] for _, group in waves(things) for thing in group]
    assert order.index("ResourceClaimTemplate") < order.index("RayService")


def test_a_template_that_a_cluster_still_names_stays(world: World) -> None:
    """An upgrade's old cluster makes pods until it is deleted."""
    world.running.put(make_node("gpu-1", gpus=2))
    assert world.deploy(world.spec_file("single-gpu", components=["dra"]))[0] == exits.DONE
    [cluster] = world.running.all("RayCluster")
    world.running.put({**cluster, "metadata": {"name": "old", "namespace": "argosy"}})
    spec = world.spec_file("single-gpu", engine={"upgrade": "new-cluster"})
    code, text = world.deploy(spec)
    assert code == exits.DONE, text
    [template] = world.running.all("ResourceClaimTemplate")
    assert template["metadata"]["name"] in str(world.running.find("RayCluster", "old"))
