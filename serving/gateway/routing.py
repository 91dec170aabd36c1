"""Which replica gets the next choice."""

from __future__ import annotations

from collections.abc import Iterable

from serving.gateway.link import Link


def pick(links: Iterable[Link]) -> Link | None:
    """The least loaded link that may take new work now; ties go to the lowest replica id."""
    best: Link | None = None
    best_load = 0
    for link in links:
        if not link.can_take:
            continue
        load = link.load + link.foreign_load
        if best is None or load < best_load or (load == best_load and link.replica < best.replica):
            best, best_load = link, load
    return best
