"""The life of a request: when what happened to it and why, from its arrival to its end.

Read when somebody asks (`account.py`) and once when it ends (logs, traces). What became of its choices they tell
themselves (`choice_life.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from serving.errors import ArgosyError
from serving.gateway.choice_life import MIN_WAIT_S, ChoiceLife, Detail, Event, Gap


@dataclasses.dataclass(slots=True, eq=False)
class Life:
    """One request's, from the first byte of its head. Until it is admitted it has no choices and no id of its own."""

    request_id: str  # as in the reply's x-request-id
    endpoint: str
    arrived: float
    arrived_wall: float  # unix seconds
    trace: tuple[str, str] = ("", "")  # traceparent and tracestate as the client sent them
    on_end: Callable[[Life], None] = lambda life: None  # called once
    id: str = ""
    model: str = ""
    fingerprint: str = ""
    is_stream: bool = False
    n: int = 1
    priority: int = 0
    num_prompt_tokens: int = 0  # as usage counts them: a prompt once, however many choices continue it
    events: list[Event] = dataclasses.field(default_factory=list)
    choices: list[ChoiceLife] = dataclasses.field(default_factory=list)
    error: ArgosyError | None = None
    ended: float | None = None
    has_left: bool = False  # the client went before the end
    is_refused: bool = False  # it never reached a queue

    def did(self, kind: str, since: float, now: float, **detail: Detail) -> None:
        """A part of its preparation is over; one that took no time to speak of is left out."""
        if now - since >= MIN_WAIT_S or detail:
            self.events.append(Event(kind, since, now, detail))

    def end(self, now: float, error: ArgosyError | None, *, has_left: bool) -> None:
        """The reply is over, or will never begin. Idempotent."""
        if self.ended is not None:
            return
        # A copy: the exception itself would keep its frames alive, and with them the request's text.
        self.error = None if error is None else type(error)(error.message, code=error.error_code, reason=error.reason)
        self.ended, self.has_left = now, has_left
        self.is_refused = error is not None and all(choice.state == "preparing" for choice in self.choices)
        for choice in self.choices:
            choice.end(now, "cancelled", {})
        self.on_end(self)

    @property
    def state(self) -> str:
        """preparing, queued, prefill, decode, finished, failed, cancelled or refused."""
        if self.ended is not None:
            if self.error is not None:
                return "refused" if self.is_refused else "failed"
            return "cancelled" if self.has_left else "finished"
        states = {choice.state for choice in self.choices}
        return next((state for state in ("decode", "prefill", "queued") if state in states), "preparing")

    @property
    def num_tokens(self) -> int:
        """Completion tokens, as usage counts them."""
        return sum(choice.num_tokens if choice.num_rendered is None else choice.num_rendered for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, each told by the first of its choices, as in usage."""
        return sum(choice.cached_tokens or 0 for choice in self.choices[:: max(self.n, 1)])

    @property
    def num_events(self) -> int:
        return len(self.events) + sum(len(choice.events) for choice in self.choices)

    @property
    def replica(self) -> str:
        """Where its first choice went last."""
        return self.choices[0].replica if self.choices else ""

    @property
    def longest_gap(self) -> Gap | None:
        gaps = [choice.longest_gap for choice in self.choices if choice.longest_gap is not None]
        return max(gaps, key=lambda gap: gap.seconds, default=None)

    def summary(self) -> dict[str, float | int]:
        """Where the time went, as the metrics of the same names count it; what has not happened is absent."""
        found: dict[str, float | int] = {
            name: event.seconds for event in self.events if (name := _PARTS.get(event.kind)) is not None
        }
        queued = _first(event.at for choice in self.choices for event in choice.events if event.kind in _ARRIVALS)
        sent = _first(event.at for choice in self.choices for event in choice.events if event.kind == "sent")
        first = _first(choice.first_token_at for choice in self.choices if choice.first_token_at is not None)
        if queued is not None and sent is not None:
            found["queue_s"] = sent - queued
        if first is not None:
            found["time_to_first_token_s"] = first - self.arrived
            found["decode_s"] = max(choice.last_token_at for choice in self.choices if choice.num_tokens) - first
            if sent is not None:
                found["prefill_s"] = first - sent
        gap = self.longest_gap
        if gap is not None:
            found["longest_gap_s"] = gap.seconds
        for name in ("num_gaps", "num_preemptions", "num_resumes"):
            found[name] = sum(getattr(choice, name) for choice in self.choices)
        return found


_ARRIVALS = ("queued", "sent")
_PARTS = {"read": "read_s", "tokenised": "tokenise_s"}


def _first(moments: Iterable[float]) -> float | None:
    return min(moments, default=None)
