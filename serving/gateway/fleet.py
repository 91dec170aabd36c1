"""The replicas that this gateway knows, their links and model cards (C23)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from serving.gateway.link import Link
from serving.gateway.pulse import MAX_SILENCE_S
from serving.types import ModelCard


@dataclasses.dataclass(slots=True, eq=False)
class Replica:
    """One endpoint. Its link comes and goes; the endpoint stays until membership drops it."""

    endpoint: str
    is_listed: bool = True  # by the directory, or in the settings
    is_draining: bool = False  # by the word of the directory
    link: Link | None = None
    id: str = ""  # as it last called itself
    epoch: int = 0
    error: str = "not yet connected"  # why there is no link

    def progress(self, now: float) -> dict[str, Any]:
        """Its entry of `/progressz`; ages grow by the time since the beat that told them."""
        link = self.link
        entry: dict[str, Any] = {"id": self.id or self.endpoint, "state": "down", "epoch": self.epoch, "ranks": []}
        if link is None:
            entry["error"] = self.error
            return entry
        entry["state"] = link.state
        beat = link.pulse.last_beat
        if beat is None:
            return entry
        silence_s = link.pulse.age_s(now)
        entry["ranks"] = [
            {
                "rank": rank.rank,
                "host": rank.host,
                "pid": rank.pid,
                "step": rank.step,
                "age_s": round(rank.age_s + silence_s, 3),
            }
            for rank in beat.ranks
        ]
        entry.update(
            beat_age_s=round(silence_s, 3),
            step=beat.step,
            step_age_s=beat.step_age_s,
            num_running=beat.num_running,
            num_waiting=beat.num_waiting,
            blocks_used=beat.blocks_used,
            blocks_total=beat.blocks_total,
            tokens_per_s=beat.tokens_per_s,
            num_rows=link.num_rows,
            num_permits=link.num_permits,
        )
        return entry


class Fleet:
    """Replicas by endpoint, links and cards by fingerprint."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self._links: dict[str, list[Link]] = {}
        self._cards: dict[str, ModelCard] = {}  # by fingerprint, the latest heard of last

    def opened(self, link: Link) -> None:
        fingerprint = link.card.fingerprint
        self._cards.pop(fingerprint, None)
        self._cards[fingerprint] = link.card
        self._links.setdefault(fingerprint, []).append(link)

    def ended(self, link: Link) -> None:
        links = self._links.get(link.card.fingerprint, [])
        if link in links:
            links.remove(link)

    def links(self, fingerprint: str) -> list[Link]:
        return self._links.get(fingerprint, [])

    def all_links(self) -> Iterator[Link]:
        return (link for links in list(self._links.values()) for link in list(links))

    def cards(self) -> list[ModelCard]:
        """One card per served model name: the one that new requests are pinned to."""
        models = dict.fromkeys(card.model for card in self._cards.values())
        return [card for card in map(self.card, models) if card is not None]

    def model(self, fingerprint: str) -> str:
        """The name under which it is served; "" when no such card was ever seen."""
        card = self._cards.get(fingerprint)
        return "" if card is None else card.model

    def card(self, model: str) -> ModelCard | None:
        """The fingerprint with most ready replicas of that name; among equals the latest heard of."""
        best: ModelCard | None = None
        best_count = -1
        for fingerprint, card in self._cards.items():
            if card.model != model:
                continue
            count = sum(link.state == "ready" for link in self.links(fingerprint))
            if count >= best_count:
                best, best_count = card, count
        return best

    def forget(self, fingerprint: str) -> bool:
        """Drops a card without links when another one serves its model; whether it did."""
        card = self._cards.get(fingerprint)
        if card is None or self.links(fingerprint):
            return False
        if not any(other.model == card.model and self.links(other.fingerprint) for other in self._cards.values()):
            return False
        del self._cards[fingerprint]
        self._links.pop(fingerprint, None)
        return True

    def is_fresh(self, link: Link, now: float) -> bool:
        """Whether the link would take work or queue it: ready, and heard of just now."""
        return link.state == "ready" and link.pulse.age_s(now) <= MAX_SILENCE_S

    def why_waiting(self, fingerprint: str) -> str:
        """What keeps a choice in the queue, in a word of `choice_life.QUEUE_CAUSES`."""
        links = self.links(fingerprint)
        if not links:
            return "no_replica"
        return "no_permit" if any(link.state == "ready" for link in links) else "not_ready"

    def progress(self, now: float) -> list[dict[str, Any]]:
        return [replica.progress(now) for replica in self.replicas.values()]
