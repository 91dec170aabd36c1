"""What is committed is what the specs say, and kustomize makes of it what a cluster shall have."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k8s import deployment, render
from k8s.spec import COMPONENTS, ServingSpec, spec_from
from tests.k8s.manifests import OVERLAYS, ROOT, manifests, printed, spec_named
from tests.k8s.optional import OPTIONAL

NEED_GPUS = ("dra", "gpu-health")


def test_render_and_commit_are_the_same() -> None:
    differing, left_over = render.stale_files()
    assert not differing and not left_over, "run `python -m k8s.render`"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_prints_exactly_the_objects_of_the_spec(overlay: str) -> None:
    found = manifests(overlay).objects
    wanted = deployment.objects(render.overlay_spec(overlay))
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if found[key] != wanted[key]]


def variants() -> dict[str, ServingSpec]:
    """Deployments that nobody committed."""
    large, small = render.overlay_spec("prod-h100-tp8"), render.overlay_spec("dev-cpu")
    replace = dataclasses.replace
    found = {f"only-{name}": replace(small, components=(name,)) for name in COMPONENTS if name not in NEED_GPUS}
    found |= {f"without-{name}": _without(large, name) for name in COMPONENTS}
    found |= {f"with-{name}": make() for name, make in OPTIONAL.items()}
    found["other-storage"] = replace(
        large, cluster=replace(large.cluster, storage_class="fast", shared_storage_class="nfs", gpu_product="")
    )
    found["other-namespace"] = replace(large, namespace="models")
    found["other-name"] = replace(small, name="llm", namespace="llm")
    found["a-cache-of-names"] = replace(small, cluster=replace(small.cluster, dns_cidr="169.254.20.10/32"))
    found["pulls-with-a-secret"] = replace(large, images=replace(large.images, pull_secret="registry"))
    return found


def _without(spec: ServingSpec, name: str) -> ServingSpec:
    engine = spec.engine
    if name == "autoscale-ray":
        engine = dataclasses.replace(engine, min_replicas=2, max_replicas=2)
    return dataclasses.replace(spec, engine=engine, components=tuple(c for c in spec.components if c != name))


@pytest.mark.parametrize("name", variants())
def test_any_spec_becomes_an_overlay_that_says_the_same(name: str) -> None:
    spec = variants()[name]
    assert printed(spec) == deployment.objects(spec)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_is_used_and_changes_something(component: str) -> None:
    assert any(spec_named(name).has(component) for name in (*OVERLAYS, *OPTIONAL))
    made = render.component_change(component)
    assert made.added or made.patched
    assert (ROOT / "k8s" / "components" / component / "README.md").is_file()


def test_rendering_twice_gives_the_same_bytes() -> None:
    program = "from k8s import render; import json; print(json.dumps(render.render(), sort_keys=True))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 10_000


def test_check_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(render.ROOT, tmp_path / "k8s", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(render, "ROOT", tmp_path / "k8s")
    assert render.main(["--check"]) == 0
    patch = tmp_path / "k8s" / "overlays" / "dev-cpu" / "patch-rayservice-argosy.yaml"
    patch.write_text(patch.read_text() + "# by hand\n")
    (patch.parent / "extra.yaml").write_text("a: 1\n")
    assert render.main(["--check"]) == 1
    assert render.main([]) == 0 and render.main(["--check"]) == 0
    assert not (patch.parent / "extra.yaml").exists()


def test_a_placeholder_is_told() -> None:
    spec = render.overlay_spec("prod-h100-tp8")
    assert len(spec.placeholder_images) == 3
    assert render.overlay_spec("dev-cpu").placeholder_images == ()
    assert spec_from({"engine": {"kv_cache_bytes": "1GiB"}}).placeholder_images == ()
