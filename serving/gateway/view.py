"""The data plane as /metrics shows it: one reading of queues, links and counts."""

from __future__ import annotations

from collections import Counter

from serving.gateway.link import Link
from serving.gateway.placement import Placement
from serving.metrics.snapshot import PlaneView, ReplicaView

MAX_NAME = 64
"""Characters of a replica's name that a label shows."""


def view_of(placement: Placement, now: float) -> PlaneView:
    """now: of the placement's clock."""
    fleet = placement.fleet
    links = sorted(fleet.all_links(), key=lambda link: link.opened_at)
    by_name = {link.replica[:MAX_NAME]: link for link in links}  # a replica connected twice is shown once
    models = {card.fingerprint: card.model for card in fleet.cards()}
    models |= {link.card.fingerprint: link.card.model for link in links}
    tokens = placement.num_queued_tokens()
    queued: dict[str, tuple[int, int]] = {}
    for fingerprint, num_choices in placement.num_queued().items():
        model = models.get(fingerprint, "")
        choices_so_far, tokens_so_far = queued.get(model, (0, 0))
        queued[model] = choices_so_far + num_choices, tokens_so_far + tokens[fingerprint]
    states = Counter(replica.link.state if replica.link is not None else "down" for replica in fleet.replicas.values())
    views = [_view(name, link, now) for name, link in by_name.items()]
    return PlaneView(
        models=tuple(dict.fromkeys(models.values())),
        replicas=tuple(view for view in views if view is not None),
        replica_states=states,
        queued=queued,
        links_ended=placement.counts.links_ended,
        faults=placement.counts.faults,
        loop_lag=placement.loop_lag,
    )


def _view(name: str, link: Link, now: float) -> ReplicaView | None:
    beat = link.pulse.last_beat
    if beat is None:
        return None
    return ReplicaView(name, link.card.model, beat, link.pulse.age_s(now), link.stats)
