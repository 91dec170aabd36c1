"""Deployments with components that no overlay has, built as an overlay is."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import yaml

from k8s import render
from k8s.patches import keyed
from k8s.spec import NO_DIGEST, ServingSpec
from tests.k8s.manifests import Manifests, kustomize

Built = Callable[[str], Manifests]
WEIGHTS: Final = f"registry.invalid/argosy/weights@{NO_DIGEST}"


def changed(overlay: str, *added: str, without: tuple[str, ...] = ()) -> ServingSpec:
    """An overlay's spec with other components."""
    spec = render.overlay_spec(overlay)
    components = {*spec.components, *added} - set(without)
    images = dataclasses.replace(spec.images, weights=WEIGHTS)
    return dataclasses.replace(spec, components=tuple(sorted(components)), images=images)


OPTIONAL: Final[dict[str, Callable[[], ServingSpec]]] = {
    "weights-image": lambda: changed("prod-h100-tp8", "weights-image", without=("weights-pvc",)),
    "weights-image-on-a-cpu": lambda: changed("dev-cpu", "weights-image"),
    "dra": lambda: changed("prod-multihost-tp8-pp2", "dra", without=("balloons", "gpu-health")),
    "dra-on-one-gpu": lambda: changed("single-gpu", "dra"),
    "dra-and-weights-image": lambda: changed(
        "prod-scale-to-zero", "dra", "weights-image", without=("gpu-health", "weights-pvc")
    ),
}


def build(spec: ServingSpec, folder: Path) -> Manifests:
    """What kustomize prints for the overlay that is rendered for a spec. folder: an empty one."""
    for part in ("base", "components"):
        shutil.copytree(render.ROOT / part, folder / part)
    for path, text in render.render_overlay(spec, "overlays/x").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return Manifests(spec, keyed(yaml.load_all(kustomize(folder / "overlays" / "x"), yaml.CSafeLoader)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Name -> what kustomize prints, as a copy that the caller may break."""
    known: dict[str, Manifests] = {}

    def made(name: str) -> Manifests:
        if name not in known:
            known[name] = build(OPTIONAL[name](), tmp_path_factory.mktemp(name))
        return Manifests(known[name].spec, copy.deepcopy(known[name].objects))

    return made
