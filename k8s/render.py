"""`python -m k8s.render [--check]`: writes k8s/base, k8s/components and k8s/overlays from the specs in them.

`base` is the deployment of k8s/base/spec.yaml. A component holds what it changes alike in every deployment, and its
own objects as for the base. An overlay holds what then still differs from its spec's objects: replacing, adding and
deleting until kustomize prints exactly `k8s.deployment.objects(spec)`, which a test compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Final

from k8s import deployment
from k8s.objects import Object
from k8s.patches import Change, Key, change, fitting, keyed
from k8s.spec import COMPONENTS, ServingSpec, SpecError, read_spec
from k8s.yaml_text import HEADING, documents, dump

ROOT: Final = Path(__file__).parent
SPEC_FILE: Final = "spec.yaml"
_GENERATED: Final = ("*.yaml",)
_KEPT: Final = ("argosy.rules.yaml", SPEC_FILE)
"""Made by somebody else: serving/metrics, and people."""


def base_spec() -> ServingSpec:
    return read_spec(ROOT / "base" / SPEC_FILE)


def overlay_names() -> list[str]:
    """Folders of k8s/overlays that hold a spec."""
    return sorted(path.parent.name for path in (ROOT / "overlays").glob(f"*/{SPEC_FILE}"))


def overlay_spec(name: str) -> ServingSpec:
    """Raises SpecError."""
    return read_spec(ROOT / "overlays" / name / SPEC_FILE)


def render() -> dict[str, str]:
    """Path below k8s/ -> text, of every generated file."""
    files = _base_files()
    for name in sorted(deployment.COMPONENTS):
        files |= _component_files(name)
    for name in overlay_names():
        try:
            files |= render_overlay(overlay_spec(name), f"overlays/{name}")
        except SpecError as error:
            raise SpecError(f"overlay {name}: {error}") from None
    return files


def render_overlay(spec: ServingSpec, folder: str) -> dict[str, str]:
    """An overlay's files: path below k8s/ -> text. folder: two below k8s/, such as overlays/dev-cpu."""
    before = keyed(_base_objects().values())
    for name in spec.components:
        before = component_change(name).apply(before)
    left = change(before, deployment.objects(spec))
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base"],
    }
    if spec.components:
        kustomization["components"] = [f"../../components/{name}" for name in spec.components]
    return _kustomized(folder, kustomization, left)


# --- base ---------------------------------------------------------------------------------------


def _base_objects() -> dict[Key, Object]:
    return deployment.objects(base_spec())


def _base_files() -> dict[str, str]:
    spec = base_spec()
    files: dict[str, str] = {}
    for part, things in deployment.objects_by_part(spec).items():
        for stem, thing in _file_names(spec, things).items():
            files[f"base/{part}/{stem}.yaml"] = documents([thing])
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(path.removeprefix("base/") for path in files),
    }
    return files | {"base/kustomization.yaml": HEADING + dump(kustomization)}


def _file_names(spec: ServingSpec, things: list[Object]) -> dict[str, Object]:
    """File name without its end -> object: its kind, and its name where a folder holds several of the kind."""
    kinds = [thing["kind"] for thing in things]
    found: dict[str, Object] = {}
    for thing in things:
        stem = str(thing["kind"]).lower()
        if kinds.count(thing["kind"]) > 1:
            name = thing["metadata"]["name"].removeprefix(f"{spec.name}-")
            stem += "-" + (name.rpartition("-")[0] if thing.get("immutable") else name)
        found[stem] = thing
    return found


# --- components ---------------------------------------------------------------------------------


def _probes(name: str) -> tuple[ServingSpec, ServingSpec]:
    """Two deployments as different as they come, to see what a component does to both."""
    small = base_spec()
    large = dataclasses.replace(
        small,
        namespace=small.namespace,
        engine=dataclasses.replace(
            small.engine,
            device="cuda",
            tensor_parallel_size=8,
            gpu_memory_bytes=80 << 30,
            max_num_seqs=64,
            min_replicas=2,
            max_replicas=2,
        ),
        images=dataclasses.replace(small.images, engine="example/engine:1", gateway="example/gateway:1"),
    )
    if name in ("dra", "gpu-health"):  # which need GPUs
        small = dataclasses.replace(
            large, engine=dataclasses.replace(large.engine, tensor_parallel_size=1), images=small.images
        )
    return small, large


@functools.cache
def component_change(name: str) -> Change:
    """What a component adds, and what it changes alike everywhere."""
    changes = []
    for spec in _probes(name):
        changes.append(
            change(deployment.objects(spec), deployment.objects(dataclasses.replace(spec, components=(name,))))
        )
    small, large = changes
    base = _base_objects()
    patched = {
        key: fitting(base[key], [operation for operation in operations if operation in large.patched.get(key, [])])
        for key, operations in small.patched.items()
        if key in base
    }
    return Change(
        added=small.added,
        removed=tuple(key for key in small.removed if key in large.removed),
        patched={key: operations for key, operations in patched.items() if operations},
    )


def _component_files(name: str) -> dict[str, str]:
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    return _kustomized(f"components/{name}", kustomization, component_change(name))


# --- files --------------------------------------------------------------------------------------


def _kustomized(folder: str, kustomization: dict[str, Any], made: Change) -> dict[str, str]:
    """A kustomization that makes the change, and its files."""
    files: dict[str, str] = {}
    resources = list(kustomization.get("resources", []))
    if made.added:
        files[f"{folder}/objects.yaml"] = documents(made.added.values())
        resources.append("objects.yaml")
    patches: list[dict[str, Any]] = []
    for api, kind, name in made.removed:
        patch = {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "$patch": "delete"}
        patches.append({"patch": dump(patch), "target": _target((api, kind, name))})
    for key, operations in made.patched.items():
        path = f"patch-{key[1].lower()}-{key[2]}.yaml"
        files[f"{folder}/{path}"] = HEADING + dump(operations)
        patches.append({"path": path, "target": _target(key)})
    kustomization = dict(kustomization)
    if resources:
        kustomization["resources"] = resources
    if patches:
        kustomization["patches"] = patches
    files[f"{folder}/kustomization.yaml"] = HEADING + dump(kustomization)
    return files


def _target(key: Key) -> dict[str, str]:
    group, _, version = key[0].rpartition("/")
    return {**({"group": group} if group else {}), "version": version, "kind": key[1], "name": key[2]}


def stale_files() -> tuple[dict[str, str], list[str]]:
    """(files that are missing or differ: path below k8s/ -> text, files that nothing renders any more)."""
    wanted = render()
    differing = {
        path: text
        for path, text in wanted.items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text(encoding="utf-8") != text
    }
    folders = [ROOT / "base", *(ROOT / "components" / name for name in COMPONENTS)]
    folders += [ROOT / "overlays" / name for name in overlay_names()]
    present = [path for folder in folders for path in folder.rglob("*.yaml") if path.name not in _KEPT]
    return differing, sorted(name for path in present if (name := str(path.relative_to(ROOT))) not in wanted)


def main(arguments: list[str]) -> int:
    """0: done, or nothing to do; 1: --check found a difference; 2: a spec is refused."""
    parser = argparse.ArgumentParser(prog="python -m k8s.render", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    is_check = parser.parse_args(arguments).check
    try:
        differing, left_over = stale_files()
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in sorted([*differing, *left_over]):
        print(f"{'differs' if is_check else 'removed' if path in left_over else 'written'}: k8s/{path}")
    if is_check:
        return 1 if differing or left_over else 0
    for path, text in differing.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
    for path in left_over:
        (ROOT / path).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
