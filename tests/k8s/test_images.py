"""The recipes of the images: what they install, copy and run as; and the gateway's tree, built and started."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from k8s.images import check, lock
from k8s.images.recipe import Recipe, RecipeError, parse
from k8s.objects import USER
from tests.k8s.manifests import OVERLAYS, ROOT, manifests

DOCKERFILES = ("Dockerfile.gateway", "Dockerfile.engine")
every_dockerfile = pytest.mark.parametrize("name", DOCKERFILES)
every_image = pytest.mark.parametrize("image", lock.IMAGES)


def locked(image: str) -> dict[str, tuple[str, list[str]]]:
    """Distribution -> (version, hashes)."""
    text = (ROOT / "k8s" / "images" / f"requirements-{image}.txt").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("==")
            version, *hashes = rest.split()
            found[lock.name_of(name)] = version, hashes
    return found


@every_image
def test_locks_hold_what_the_project_pins_with_hashes(image: str) -> None:
    found = locked(image)
    for requirement in lock.requirements(image):
        name, version = lock.name_of(requirement), requirement.partition("==")[2]
        assert found[name][0] == version, requirement
    for name, (_, hashes) in found.items():
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in hashes), name


def test_gateways_have_neither_torch_nor_ray() -> None:
    assert not {"torch", "ray", "numpy", "locust", "gevent", "kubernetes"} & locked("gateway").keys()
    assert {"torch", "ray", "kubernetes"} <= locked("engine-cpu").keys() & locked("engine-cuda").keys()
    assert locked("engine-cpu")["torch"][0] == locked("engine-cuda")["torch"][0] + "+cpu"
    assert "nvidia-nccl-cu13" in locked("engine-cuda") and "nvidia-nccl-cu13" not in locked("engine-cpu")


def test_every_requirement_of_the_project_is_in_an_image() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {lock.name_of(line) for line in ours} <= locked("engine-cuda").keys()
    assert set(lock.GATEWAY) <= {lock.name_of(line) for line in ours}


@every_dockerfile
def test_recipes_are_pinned_and_end_unprivileged(name: str) -> None:
    steps = parse((ROOT / name).read_text())
    assert next(step.text for step in steps if step.name == "ARG") == "BASE", "no default: nobody here knows a digest"
    assert {step.text.partition(" AS ")[0] for step in steps if step.name == "FROM"} == {"${BASE}"}
    last = steps[max(i for i, step in enumerate(steps) if step.name == "FROM") :]
    assert [step.text for step in last if step.name == "USER"] == [f"{USER}:{USER}"]
    installs = [step.text for step in steps if "pip install" in step.text]
    for text in installs:
        assert "--no-deps" in text and ("--require-hashes" in text or text.endswith(" ."))
    assert sum("--require-hashes" in text for text in installs) == 1
    assert [step.text for step in last if step.name == "ENTRYPOINT"] == ['["argosy"]']


@every_dockerfile
def test_what_is_copied_exists_and_nothing_else_travels(name: str, tmp_path: Path) -> None:
    recipe = Recipe(ROOT / name, ROOT, tmp_path, {})
    for step in parse((ROOT / name).read_text()):
        if step.name != "COPY" or step.text.startswith("--from"):
            continue
        for source in step.text.split()[:-1]:
            for variant in ("gateway", "loadtest") if "EXTRA" in source else ("cpu", "cuda"):
                path = Path(source.replace("${EXTRA}", variant).replace("${VARIANT}", variant))
                assert (ROOT / path).exists(), path
                assert (ROOT / path).is_dir() or not recipe.is_ignored(path), path


@pytest.mark.parametrize(
    ("path", "is_out"),
    [
        ("serving/cli.py", False),
        ("models/ops/cpu.cpp", False),
        ("k8s/gpu_guard.py", False),
        ("k8s/overlays/dev-cpu/spec.yaml", True),
        ("serving/__pycache__/cli.pyc", True),
        ("models/ops/_cpu_base.so", True),
        ("models/x/weights.safetensors", True),
        ("models/x.gguf", True),
        (".git/config", True),
        ("tests/tiny.py", True),
        ("secret", True),
        ("serving/.env", True),
    ],
)
def test_the_context_is_an_allow_list(path: str, is_out: bool, tmp_path: Path) -> None:
    assert Recipe(ROOT / "Dockerfile.engine", ROOT, tmp_path, {}).is_ignored(Path(path)) is is_out


def test_instructions_that_nobody_tests_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("# a comment\nARG BASE\n\nRUN one \\\n  two\n")
    assert [(step.line, step.name, step.text) for step in parse(dockerfile.read_text())] == [
        (2, "ARG", "BASE"),
        (4, "RUN", "one   two"),
    ]
    with pytest.raises(RecipeError, match="line 4: RUN before FROM"):
        Recipe(dockerfile, tmp_path, tmp_path / "s", {}).build()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_as_the_images_user(overlay: str) -> None:
    for pod in manifests(overlay).pods():
        context = pod.spec["securityContext"]
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == USER


def test_the_gateways_tree_is_built_and_started() -> None:
    """The whole recipe, pip included, and the pod's own command on a read-only root as an unprivileged user."""
    if reason := check.why_not():
        pytest.skip(f"the recipe cannot be followed here: {reason}")
    ran = subprocess.run(
        [sys.executable, "-m", "k8s.images.check", "gateway"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "lives, is not ready without a cluster" in ran.stdout
