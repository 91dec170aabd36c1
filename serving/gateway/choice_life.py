"""The life of a choice: when what happened to it and why.

Written by whoever does a thing to the choice, on the monotonic clock. It holds no text and no tokens, and its size is
bounded: beyond MAX_EVENTS events are counted and left out. A token costs one call of `ChoiceLife.grew`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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
        "cached_tokens",
        "events",
        "finish_reason",
        "first_token_at",
        "last_token_at",
        "longest_gap",
        "num_events_left_out",
        "num_gaps",
        "num_preemptions",
        "num_rendered",
        "num_resumes",
        "num_tokens",
        "replica",
        "state",
    )

    def __init__(self) -> None:
        self.state = "preparing"
        self.events: list[Event] = []
        self.num_events_left_out = 0
        self.num_tokens = 0  # that came
        self.num_rendered: int | None = None  # of those, the reply's own: none beyond a stop string; None = not over
        self.cached_tokens: int | None = None  # of its prompt, when it was first admitted (C21)
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
        if self.cached_tokens is None:
            self.cached_tokens = num_cached
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

    def finish(self, now: float, reason: str, num_rendered: int) -> None:
        """The reply has all of it."""
        if not self.is_over:
            self.finish_reason, self.num_rendered = reason, num_rendered
        self.end(now, "finished", {"reason": reason, "tokens": num_rendered})

    def end(self, now: float, state: str, detail: Mapping[str, Detail]) -> None:
        """state: finished, failed (detail: code) or cancelled. Only the first end counts."""
        if self.is_over:
            return
        self._leave_queue(now)
        self._end_decode()
        self.state = state
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
