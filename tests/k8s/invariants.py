"""The registry of what must hold in every overlay: each invariant with changes that it must notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.k8s.manifests import Manifests

Check = Callable[[Manifests], Iterator[str]]
Break = Callable[[Manifests], object]


@dataclasses.dataclass(frozen=True)
class Invariant:
    """check: complaints about manifests, none when it holds. breaks: changes to a copy that it must notice."""

    check: Check
    breaks: tuple[Break, ...]
    overlay: str  # whose copy is broken

    @property
    def name(self) -> str:
        return self.check.__name__


INVARIANTS: list[Invariant] = []


def invariant(*breaks: Break, overlay: str = "prod-h100-tp8") -> Callable[[Check], Check]:
    """Registers a check."""
    assert breaks, "an invariant that nothing breaks shows nothing"

    def register(check: Check) -> Check:
        INVARIANTS.append(Invariant(check, breaks, overlay))
        return check

    return register
