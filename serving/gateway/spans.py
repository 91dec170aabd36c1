"""A life as spans: what a trace shows of a request, before OpenTelemetry has seen it.

    POST /v1/completions            the request
    ├─ read, model, tokenizer, tokenise
    ├─ queue                        one per wait of a choice
    ├─ prefill                      from a replica's taking the choice to its next token
    └─ decode                       from the choice's first token to its last; gaps and preemptions are its events
       └─ resume                    from the loss of a replica to the first token after it
          ├─ queue
          └─ prefill

A resume before the first token is a child of the request. Times are the life's, on the monotonic clock; a child lies
within its parent. It holds no text, for the life holds none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from serving.gateway.choice_life import ChoiceLife, Detail, Event
from serving.gateway.life import Life

MAX_CHOICES: Final = 16
"""Of one request that have spans; the request's own span counts the others."""
MAX_POINTS: Final = 100
"""Events of one span."""

_PREPARATION: Final = {"tokenised": "tokenise"}
_POINTS: Final = ("waited", "admitted", "chunk", "gap", "preempted", "returned")
_ENDS: Final = ("finished", "failed", "cancelled")


@dataclasses.dataclass(slots=True)
class Part:
    """One span. at, until and the points' times: monotonic seconds."""

    name: str
    at: float
    until: float
    parent: Part | None
    attributes: dict[str, Detail] = dataclasses.field(default_factory=dict)
    points: list[tuple[str, float, dict[str, Detail]]] = dataclasses.field(default_factory=list)
    num_points_left_out: int = 0

    def covers(self, moment: float) -> bool:
        return self.at <= moment <= self.until

    def add_point(self, event: Event) -> None:
        if len(self.points) >= MAX_POINTS:
            self.num_points_left_out += 1
            return
        detail = {f"argosy.{name}": value for name, value in event.detail.items()}
        if event.until > event.at:
            detail["argosy.for_s"] = round(event.until - event.at, 6)
        self.points.append((event.kind, event.at, detail))


def parts_of(life: Life) -> list[Part]:
    """Every span of an ended life, parents before their children; the first is the request's."""
    root = Part(f"POST {life.endpoint}", life.arrived, life.ended or life.arrived, None)
    parts = [root]
    for event in life.events:
        parts.append(_child(root, _PREPARATION.get(event.kind, event.kind), event.at, event.until, event.detail))
    for index, choice in enumerate(life.choices[:MAX_CHOICES]):
        for part in _choice_parts(root, choice):
            part.attributes["argosy.choice"] = index
            parts.append(part)
    if len(life.choices) > MAX_CHOICES:
        root.attributes["argosy.choices_left_out"] = len(life.choices) - MAX_CHOICES
    return parts


def _choice_parts(root: Part, choice: ChoiceLife) -> Iterator[Part]:
    events = sorted(choice.events, key=lambda event: event.at)
    over = next((event.at for event in reversed(events) if event.kind in _ENDS), root.until)
    tokens_at = [event.at for event in events if event.kind == "decode"]
    decode = None
    if choice.first_token_at is not None:
        first = choice.first_token_at
        tokens_at.append(first)
        decode = _child(root, "decode", first, max(choice.last_token_at, first), {"tokens": choice.num_tokens})
        if choice.finish_reason:
            decode.attributes["argosy.finish_reason"] = choice.finish_reason
        if choice.num_events_left_out:
            decode.attributes["argosy.events_left_out"] = choice.num_events_left_out
        yield decode

    def until_next(event: Event, *kinds: str) -> float:
        """When the choice grew next, or something of `kinds` happened, or it was over."""
        later = [at for at in tokens_at if at >= event.at]
        later += [other.at for other in events if other.kind in kinds and other is not event and other.at >= event.at]
        return min([*later, max(over, event.at)])

    resumes: list[Part] = []
    for event in events:
        if event.kind == "lost":
            until = until_next(event, "lost")
            is_inside = decode is not None and decode.covers(event.at) and decode.covers(until)
            parent = decode if decode is not None and is_inside else root
            resumes.append(resume := _child(parent, "resume", event.at, until, event.detail))
            yield resume
    computing: list[Part] = []
    for event in events:
        around = next((resume for resume in resumes if resume.covers(event.at) and event.at < resume.until), root)
        if event.kind == "queued":
            yield _child(around, "queue", event.at, event.until, event.detail)
        elif event.kind == "sent":
            until = until_next(event, "lost", "returned")
            computing.append(prefill := _child(around, "prefill", event.at, until, event.detail))
            yield prefill
    for event in events:
        if event.kind in _POINTS:
            # What a replica tells of a step is heard after the step: its end decides whose it is.
            place = next((part for part in computing if part.covers(event.until) and event.kind != "gap"), decode)
            (place or root).add_point(event)


def _child(parent: Part, name: str, at: float, until: float, detail: dict[str, Detail]) -> Part:
    at = min(max(at, parent.at), parent.until)
    until = min(max(until, at), parent.until)
    return Part(name, at, until, parent, {f"argosy.{key}": value for key, value in detail.items()})
