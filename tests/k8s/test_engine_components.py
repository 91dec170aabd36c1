"""Components of the engine that no overlay has: what holds everywhere holds with them, and what each is there for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.k8s.test_invariants  # noqa: F401  # registers the invariants
from k8s import render
from k8s.images.recipe import Recipe
from k8s.objects import WORKER, Object
from k8s.patches import Key
from k8s.settings import model_dir
from k8s.sizing import Sizing
from k8s.spec import ServingSpec, SpecError, read_spec, spec_from
from k8s.tool import exits
from k8s.tool.deploy import default_timeout_s
from k8s.tool.diagnosis import CHECKS
from k8s.tool.doctor.facts import read_facts
from k8s.tool.doctor.table import examine
from tests.k8s.cluster_fixture import World, running, world
from tests.k8s.manifests import Manifests, manifests, printed
from tests.k8s.operators import make_node, make_pod
from tests.k8s.optional import OPTIONAL, WEIGHTS, changed

__all__ = ["running", "world"]


# --- weights-image ------------------------------------------------------------------------------


def the_model_comes_in_its_image(m: Manifests) -> Iterator[str]:
    """And in nothing else: whoever could fetch it has neither a way out nor a token."""
    from models.store.pull import resolve

    pod = m.pod(WORKER)
    read = Path(m.serve["applications"][1]["args"]["engine"]["model_dir"])
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    mounts = [mount for mount in m.container(WORKER)["volumeMounts"] if "image" in volumes[mount["name"]]]
    images = [volume["image"] for volume in volumes.values() if "image" in volume]
    if images != [{"pullPolicy": "IfNotPresent", "reference": m.spec.images.weights}]:
        yield f"the pod mounts the images {images}"
    if [resolve(m.spec.model.source, Path(mount["mountPath"])) for mount in mounts] != [read]:
        yield f"{read} is not the model's folder in the image at {[mount['mountPath'] for mount in mounts]}"
    if not all(mount.get("readOnly") for mount in mounts):
        yield "the mount is not read-only"
    if pod.spec.get("initContainers"):
        yield "something runs before the engine"
    if left := {"hub-secret", "model"} & volumes.keys():
        yield f"volumes that only a pull reads: {sorted(left)}"
    for key in m.objects:
        if key[1] == "NetworkPolicy" and key[2].endswith("-fetch"):
            yield "a policy lets pods out to hubs"
        if key[1] in ("Job", "PersistentVolumeClaim") and "weights" in key[2] + str(m.objects[key]["metadata"]):
            yield f"{key[1]} {key[2]} brings the model, too"


def _volume(m: Manifests) -> Object:
    volumes: dict[str, Object] = {volume["name"]: volume for volume in m.pod(WORKER).spec["volumes"]}
    return volumes["models"]


def _mount(m: Manifests) -> Object:
    mounts: dict[str, Object] = {mount["name"]: mount for mount in m.container(WORKER)["volumeMounts"]}
    return mounts["models"]


@pytest.mark.parametrize("name", ["weights-image", "weights-image-on-a-cpu"])
def test_the_model_comes_in_its_image(name: str) -> None:
    assert not list(the_model_comes_in_its_image(manifests(name)))


@pytest.mark.parametrize("overlay", ["dev-cpu", "prod-h100-tp8"])
def test_without_the_component_it_does_not(overlay: str) -> None:
    spec = changed(overlay)
    found = list(the_model_comes_in_its_image(Manifests(spec, printed(spec))))
    assert len(found) >= 3, found


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: _volume(m).update(image={"reference": "other:1"}),
        lambda m: (_volume(m).pop("image"), _volume(m).update(emptyDir={})),
        lambda m: _mount(m).update(mountPath="/model"),
        lambda m: _mount(m).pop("readOnly"),
        lambda m: m.alter_serve(lambda d: d["applications"][1]["args"]["engine"].update(model_dir="/models/x")),
        lambda m: m.pod(WORKER).spec.update(initContainers=[{"name": "fetch-weights"}]),
        lambda m: m.pod(WORKER).spec["volumes"].append({"name": "hub-secret", "secret": {"secretName": "argosy-hub"}}),
        lambda m: m.objects.update({_fetch_key(m): {"spec": {"podSelector": {}, "policyTypes": ["Egress"]}}}),
    ],
)
def test_a_broken_copy_is_noticed(break_it: Callable[[Manifests], object]) -> None:
    m = manifests("weights-image")
    break_it(m)
    assert list(the_model_comes_in_its_image(m))


def _fetch_key(m: Manifests) -> Key:
    return "networking.k8s.io/v1", "NetworkPolicy", f"{m.spec.name}-fetch"


def test_no_probe_waits_for_the_pull_and_a_deployment_does() -> None:
    def with_network(num_bytes: int) -> ServingSpec:
        spec = OPTIONAL["weights-image"]()
        return dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, fetch_bytes_per_s=num_bytes))

    probe = manifests("weights-image").container(WORKER)["startupProbe"]
    fast, slow = Sizing(with_network(200_000_000)), Sizing(with_network(20_000_000))
    assert probe["failureThreshold"] == fast.startup_failures == slow.startup_failures
    assert slow.fetch_s - fast.fetch_s == pytest.approx(fast.spec.model.weights_bytes * (1 / 20e6 - 1 / 200e6))
    assert default_timeout_s(slow.spec) > default_timeout_s(fast.spec) + 3 * (slow.fetch_s - fast.fetch_s) - 2
    assert probe["periodSeconds"] * probe["failureThreshold"] < slow.fetch_s


def test_an_image_is_named_by_its_digest_and_a_place_holder_is_told() -> None:
    spec = OPTIONAL["weights-image"]()
    assert WEIGHTS in spec.placeholder_images
    assert WEIGHTS not in changed("prod-h100-tp8").placeholder_images
    with pytest.raises(SpecError, match=r"images\.weights: .*names no digest"):
        dataclasses.replace(spec, images=dataclasses.replace(spec.images, weights="registry.invalid/weights:1"))


def test_the_doctor_knows_what_mounts_images(world: World) -> None:
    world.running.state.version = "v1.34.0"
    old = make_node("old")
    old["status"]["nodeInfo"]["kubeletVersion"] = "v1.34.0"
    world.running.put(old)
    for components, is_old in (([], False), (["weights-image"], True)):
        spec = read_spec(Path(world.spec_file("dev-cpu", components=components)))
        found = {result.check.name: result.texts for result in examine(CHECKS, read_facts(world.cluster, spec))}
        assert any("older than 1.35" in text for text in found["api-version"]) is is_old
        assert any("node old runs 1.34, which mounts no image" in text for text in found["kubelet-skew"]) is is_old


def test_the_doctor_looks_for_digests_of_weights_too(world: World) -> None:
    worker = {"app.kubernetes.io/instance": "argosy", "app.kubernetes.io/component": WORKER}
    volume = {"name": "models", "image": {"reference": "registry.invalid/weights:1"}}
    spec = {"containers": [{"name": "c", "image": WEIGHTS}], "volumes": [volume]}
    world.running.put(make_pod("w", "argosy", {"metadata": {"labels": worker}, "spec": spec}))
    facts = read_facts(world.cluster, OPTIONAL["weights-image"]())
    found = {result.check.name: result.texts for result in examine(CHECKS, facts)}
    assert found["image-digests"] == ("registry.invalid/weights:1 runs without a digest",)


def test_the_recipe_makes_an_image_from_which_a_model_is_read(tmp_path: Path) -> None:
    """The README's command, followed: the tree has the model where the engine looks, and loading writes nothing."""
    from models.registry import load_model
    from models.store.manifest import verify, write_manifest
    from tests.tiny import tiny_llama

    readme = (render.ROOT / "components" / "weights-image" / "README.md").read_text()
    [source] = re.findall(r"argosy pull (\S+)", readme)
    [name] = re.findall(r"--build-arg MODEL=(\S+)", readme)
    [dockerfile] = re.findall(r"-f (\S+)", readme)
    spec = spec_from({"model": {"source": source}, "engine": {"kv_cache_bytes": "1GiB"}})
    write_manifest(tiny_llama(tmp_path / "store" / name), "a test", {})
    (tmp_path / "store" / "other").mkdir()
    (tmp_path / "scratch").mkdir()
    recipe = Recipe(render.ROOT.parent / dockerfile, tmp_path / "store", tmp_path / "scratch", {"MODEL": name})
    root = recipe.build().root
    assert [path.name for path in root.iterdir()] == [name]
    folder = root / Path(model_dir(Sizing(spec))).relative_to("/models")
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (root, *root.rglob("*"))}

    before = state()
    verify(folder, deep=True)
    assert load_model(folder) is not None
    assert state() == before


# --- deployed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "component", "kind", "counts"),
    [
        ("dev-cpu", "weights-image", "NetworkPolicy", (6, 5, 6)),
        ("dev-cpu", "weights-pvc", "Job", (0, 1, 0)),
        ("single-gpu", "dra", "ResourceClaimTemplate", (0, 1, 0)),
    ],
)
def test_a_deployment_takes_a_component_on_and_leaves_it_again(
    overlay: str, component: str, kind: str, counts: tuple[int, ...], world: World
) -> None:
    """What it brings is applied, what it replaces goes, and the next deployment without it undoes both: also where
    nothing else of its kind is left."""
    world.running.put(make_node("gpu-1", gpus=2))
    for components, count in zip(([], [component], []), counts, strict=True):
        code, text = world.deploy(world.spec_file(overlay, components=components, engine={"upgrade": "new-cluster"}))
        assert code == exits.DONE, text
        assert len(world.running.all(kind)) == count, text
