"""The life of a request: when what happened to it and why, from its arrival to its end.

Written by whoever does a thing to a request or a choice, on the monotonic clock; read when somebody asks
(`account.py`) and once when it ends (logs, traces). It holds no text and no tokens, and its size is bounded: beyond
MAX_EVENTS a choice's events are counted and left out. A token costs one call of `ChoiceLife.grew`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from serving.errors import ArgosyError
from serving.gateway.steps import SeenStep, StepLog, gap_cause
from serving.types import Note, Wait

MAX_EVENTS = 160
MAX_CHUNKS = 64
"""In a row that are told apart; later ones are added up."""
MIN_GAP_S = 0.05
"""A gap is long from here on and from LONG times the choice's average; from MAX_GAP_S on in any case."""
LONG = 3.0
MAX_GAP_S = 1.0
MIN_WAIT_S = 0.001
"""Shorter waits are none."""
_FIRST_GAP_S = 0.1  # expected before any has been seen
_KEEP = 0.95  # weight of the past in the average

GAP_CAUSES = ("resumed", "preempted", "prefill", "slow_step", "large_step", "not_scheduled", "idle", "late")
QUEUE_CAUSES = ("no_permit", "no_replica", "not_ready")

Detail = int | float | str


@dataclasses.dataclass(slots=True)
class Event:
    """until: at, for what takes no time."""

    kind: str
    at: float
    until: float
    detail: dict[str, Detail] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.until - self.at


@dataclasses.dataclass(slots=True)
class Gap:
    seconds: float
    cause: str


class ChoiceLife:
    """One choice's. Its present state is `state`: preparing, queued, prefill, decode, finished, failed or cancelled."""

    __slots__ = (
        "_average_gap_s",
        "_decode",
        "_last_step",
        "_long_gap_s",
        "_queued",
        "_sent_at",
        "events",
        "finish_reason",
        "first_token_at",
        "last_token_at",
        "longest_gap",
        "num_events_left_out",
        "num_gaps",
        "num_preemptions",
        "num_resumes",
        "num_tokens",
        "replica",
        "state",
    )

    def __init__(self) -> None:
        self.state = "preparing"
        self.events: list[Event] = []
        self.num_events_left_out = 0
        self.num_tokens = 0
        self.num_gaps = 0
        self.num_preemptions = 0
        self.num_resumes = 0
        self.replica = ""  # the last that took it
        self.finish_reason = ""
        self.first_token_at: float | None = None
        self.longest_gap: Gap | None = None
        self._queued: Event | None = None  # while it waits
        self._sent_at: float | None = None  # until its scheduler has admitted it
        self._decode: Event | None = None  # tokens without a long gap, while they come
        self.last_token_at = 0.0
        self._last_step = -1
        self._average_gap_s = _FIRST_GAP_S
        self._long_gap_s = LONG * _FIRST_GAP_S

    # --- waiting ----------------------------------------------------------------------------------

    def queued(self, now: float, why: str, position: int, tokens_ahead: int) -> None:
        """why: a word of QUEUE_CAUSES. position: 1 = next. tokens_ahead: prompts and journals of those before it."""
        self.state = "queued"
        self._queued = Event("queued", now, now, {"why": why, "position": position, "tokens_ahead": tokens_ahead})

    def sent(self, now: float, replica: str, num_resumed: int) -> None:
        """A replica has been given it, with `num_resumed` tokens that it has already."""
        self._leave_queue(now)
        self.state, self.replica, self._sent_at = "prefill", replica, now
        self._add(Event("sent", now, now, {"replica": replica, "resumed_tokens": num_resumed}))

    def returned(self, now: float, code: str) -> None:
        """The replica would not have it now."""
        self._sent_at = None
        self._add(Event("returned", now, now, {"code": code}))

    def admitted(self, now: float, num_cached: int) -> None:
        """The replica's scheduler has given it a row."""
        now = max(now, self._sent_at or now)
        self._sent_at = None
        self._add(Event("admitted", now, now, {"cached_tokens": num_cached}))

    def waited(self, now: float, why: int) -> None:
        """What kept it out of its replica's batch until now; after a preemption as well."""
        began = now if self._sent_at is None else self._sent_at
        if self._sent_at is None:
            began = next((event.at for event in reversed(self.events) if event.kind == "preempted"), now)
        now = max(now, began)
        name = Wait(why).name.lower() if why in Wait.__members__.values() else "other"
        self._add(Event("waited", began, now, {"why": name}))

    def noted(self, kind: int, value: int, step: SeenStep) -> None:
        """What a replica says of the row beside its tokens; a kind that is not known is passed over."""
        if kind == Note.CHUNK:
            self.chunk(step, value)
        elif kind == Note.PREEMPTED:
            self.preempted(max(step.started_at, self.last_token_at), value)
        elif kind == Note.WAITED:
            self.waited(step.started_at, value)

    # --- computing --------------------------------------------------------------------------------

    def chunk(self, step: SeenStep, num_tokens: int) -> None:
        """A step computed a part of its prompt, or of what it has to compute again."""
        last = self.events[-1] if self.events else None
        if last is not None and last.kind == "chunk" and self._num_chunks() >= MAX_CHUNKS:
            last.until = step.ended_at
            last.detail["tokens"] = int(last.detail["tokens"]) + num_tokens
            last.detail["steps"] = int(last.detail.get("steps", 1)) + 1
            return
        detail: dict[str, Detail] = {"step": step.number, "tokens": num_tokens, "rows": step.record.num_rows}
        detail["announced_s"] = round(step.record.announced_s, 6)
        self._add(Event("chunk", step.started_at, step.ended_at, detail))

    def _num_chunks(self) -> int:
        count = 0
        for event in reversed(self.events):
            if event.kind != "chunk":
                break
            count += 1
        return count

    def grew(self, now: float, num_tokens: int, steps: StepLog) -> None:
        """A frame brought tokens: `num_tokens` in all by now. On the token path."""
        gap_s = now - self.last_token_at
        decode = self._decode
        if decode is not None and gap_s <= self._long_gap_s:
            self._average_gap_s = average = _KEEP * self._average_gap_s + (1.0 - _KEEP) * gap_s
            self._long_gap_s = min(max(LONG * average, MIN_GAP_S), MAX_GAP_S)
        else:
            self._begin_decode(now, gap_s, steps)
        self.last_token_at = now
        self._last_step = steps.last_number
        self.num_tokens = num_tokens

    def _begin_decode(self, now: float, gap_s: float, steps: StepLog) -> None:
        """The first token, or the first after an interruption or a long gap."""
        self._end_decode()
        if self.first_token_at is None:
            self.first_token_at = now
        elif gap_s > self._long_gap_s:
            self._gap(now, gap_s, steps)
        self.state = "decode"
        self._decode = Event("decode", now, now, {"tokens": self.num_tokens, "first_step": steps.last_number})

    def _end_decode(self) -> None:
        if self._decode is not None:
            self._add(self._stretch(self._decode))
            self._decode = None

    def _stretch(self, decode: Event) -> Event:
        """Tokens without a long gap between them, as they are told."""
        num_tokens = self.num_tokens - int(decode.detail["tokens"])
        steps = {"first_step": decode.detail["first_step"], "last_step": self._last_step}
        return Event("decode", decode.at, self.last_token_at, {"tokens": num_tokens, **steps})

    def _gap(self, now: float, gap_s: float, steps: StepLog) -> None:
        since = self.last_token_at
        cause, detail = self._interruption(since)
        if not cause:
            found = gap_cause(since, now, steps.since(since))
            cause, detail = found.kind, found.detail
        self.num_gaps += 1
        if self.longest_gap is None or gap_s > self.longest_gap.seconds:
            self.longest_gap = Gap(gap_s, cause)
        if not self._prolongs(cause, now, gap_s, detail):
            self._add(Event("gap", since, now, {"cause": cause, "detail": detail}))

    def _prolongs(self, cause: str, now: float, gap_s: float, detail: str) -> bool:
        """Whether only a token lies between this gap and another of the same cause: they are one event then."""
        if len(self.events) < 2:
            return False
        gap, token = self.events[-2:]
        if gap.kind != "gap" or gap.detail["cause"] != cause or token.kind != "decode" or token.detail["tokens"] != 1:
            return False
        self.events.pop()
        longest_s = float(gap.detail.get("longest_s", gap.seconds))
        if gap_s > longest_s:
            gap.detail["detail"] = detail
        gap.detail["longest_s"] = max(longest_s, gap_s)
        gap.detail["gaps"] = int(gap.detail.get("gaps", 1)) + 1
        gap.until = now
        return True

    def _interruption(self, since: float) -> tuple[str, str]:
        """What took the choice off its replica since then, if anything did."""
        for event in self.events:
            if event.at < since:
                continue
            if event.kind == "lost":
                return "resumed", f"{event.detail['replica']} was {event.detail['cause']}; resumed on {self.replica}"
            if event.kind == "preempted":
                return "preempted", f"the KV cache was full; {event.detail['tokens']} tokens had to be computed again"
        return "", ""

    def preempted(self, now: float, num_tokens: int) -> None:
        """It has lost its row; `num_tokens` of it have to be computed again."""
        self._end_decode()
        self.state, self._sent_at = "prefill", None
        self.num_preemptions += 1
        self._add(Event("preempted", now, now, {"tokens": num_tokens}))

    def lost(self, now: float, replica: str, cause: str) -> None:
        """The link that carried it is over."""
        self._end_decode()
        self._sent_at = None
        self.num_resumes += 1
        self._add(Event("lost", now, now, {"replica": replica, "cause": cause}))

    # --- the end ----------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "failed", "cancelled")

    def end(self, now: float, state: str, detail: Mapping[str, Detail]) -> None:
        """state: finished (detail: reason), failed (code) or cancelled. Only the first end counts."""
        if self.is_over:
            return
        self._leave_queue(now)
        self._end_decode()
        self.state = state
        self.finish_reason = str(detail.get("reason", ""))
        if len(self.events) >= MAX_EVENTS:  # the end is always told
            self.events.pop()
            self.num_events_left_out += 1
        self.events.append(Event(state, now, now, dict(detail)))

    def present(self, now: float) -> list[Event]:
        """What lasts at this moment, beside `events`."""
        lasting = []
        if self._queued is not None:
            lasting.append(dataclasses.replace(self._queued, until=now))
        if self._decode is not None:
            lasting.append(self._stretch(self._decode))
        return lasting

    def _leave_queue(self, now: float) -> None:
        queued, self._queued = self._queued, None
        if queued is not None and now - queued.at >= MIN_WAIT_S:
            queued.until = now
            self._add(queued)

    def _add(self, event: Event) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(event)
        else:
            self.num_events_left_out += 1


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
    num_prompt_tokens: int = 0
    cached_tokens: int = 0
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

    def end(self, now: float, error: ArgosyError | None, *, has_left: bool, cached_tokens: int = 0) -> None:
        """The reply is over, or will never begin. Idempotent."""
        if self.ended is not None:
            return
        self.ended, self.error, self.has_left, self.cached_tokens = now, error, has_left, cached_tokens
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
        return sum(choice.num_tokens for choice in self.choices)

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
