"""Running and recent lives of one gateway process, by name."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

from serving.gateway.life import Life

logger = logging.getLogger("argosy.gateway")

MAX_ENDED = 1000
MAX_REFUSED = 200
"""Apart from the others: whoever sends nonsense must not wipe out what is worth reading."""
MAX_EVENTS = 50_000
"""Of all lives that have ended, about 15 MB."""


class Lives:
    """The running ones are as many as there are connections; of the ended ones the newest are kept."""

    def __init__(
        self, *, max_ended: int = MAX_ENDED, max_refused: int = MAX_REFUSED, max_events: int = MAX_EVENTS
    ) -> None:
        self.sinks: list[Callable[[Life], None]] = []  # called once with every life that ends; must not block
        self._max_ended = max_ended
        self._max_refused = max_refused
        self._max_events = max_events
        self._num_events = 0
        self._running: dict[Life, None] = {}
        self._ended: deque[Life] = deque()
        self._refused: deque[Life] = deque()
        self._by_id: dict[str, Life] = {}
        self._by_request_id: dict[str, Life] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin(self, life: Life) -> None:
        """A request has arrived."""
        life.on_end = self._end
        self._running[life] = None
        self._by_request_id[life.request_id] = life

    def admitted(self, life: Life) -> None:
        """It has an id of its own now."""
        self._by_id[life.id] = life

    def find(self, name: str) -> Life | None:
        """By the id of the reply's body, else by x-request-id; of several with one such, the newest."""
        return self._by_id.get(name) or self._by_request_id.get(name)

    def running(self) -> Iterator[Life]:
        """Newest first."""
        return reversed(self._running)

    def ended(self) -> Iterator[Life]:
        """Those kept, latest end first."""
        both = (life for kept in (self._ended, self._refused) for life in kept)
        return iter(sorted(both, key=lambda life: life.ended or 0.0, reverse=True))

    def _end(self, life: Life) -> None:
        self._running.pop(life, None)
        is_refused = life.state == "refused"
        kept = self._refused if is_refused else self._ended
        kept.append(life)
        self._num_events += life.num_events
        while len(self._refused) > self._max_refused:
            self._forget(self._refused.popleft())
        while len(self._ended) > self._max_ended or (self._num_events > self._max_events and len(self._ended) > 1):
            self._forget(self._ended.popleft())
        for sink in self.sinks:
            try:
                sink(life)
            except Exception:  # nobody's stream ends for a log
                logger.exception("telling of request %s", life.id)

    def _forget(self, life: Life) -> None:
        self._num_events -= life.num_events
        for index, name in ((self._by_id, life.id), (self._by_request_id, life.request_id)):
            if index.get(name) is life:
                del index[name]
