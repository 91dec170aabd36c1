"""Every invariant on every overlay, and every invariant on copies that it must refuse."""

from __future__ import annotations

import pytest

import tests.k8s.invariants_of_capacity
import tests.k8s.invariants_of_edge
import tests.k8s.invariants_of_keda
import tests.k8s.invariants_of_network
import tests.k8s.invariants_of_pods
import tests.k8s.invariants_of_references
import tests.k8s.invariants_of_time  # noqa: F401  # they register what they hold
from tests.k8s.invariants import INVARIANTS, Invariant
from tests.k8s.manifests import OVERLAYS, manifests
from tests.k8s.optional import OPTIONAL


@pytest.mark.parametrize("overlay", [*OVERLAYS, *OPTIONAL])
def test_everything_holds(overlay: str) -> None:
    found = manifests(overlay)
    complaints = [f"{invariant.name}: {text}" for invariant in INVARIANTS for text in invariant.check(found)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.name)
def test_every_invariant_bites(invariant: Invariant) -> None:
    for number, break_it in enumerate(invariant.breaks):
        broken = manifests(invariant.overlay)
        break_it(broken)
        assert list(invariant.check(broken)), f"break {number} goes unnoticed"


def test_there_are_the_overlays_of_the_design() -> None:
    wanted = {"dev-cpu", "single-gpu", "prod-h100-tp8", "prod-multihost-tp8-pp2", "prod-scale-to-zero"}
    assert wanted <= set(OVERLAYS)
