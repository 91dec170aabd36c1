"""A life as JSON: what `GET /v1/requests` and `GET /v1/requests/{id}` answer. Times are seconds after the arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.gateway.choice_life import ChoiceLife, Event
from serving.gateway.life import Life


def account(life: Life, now: float) -> dict[str, Any]:
    """The whole life. now: of its clock, for what still lasts."""
    gap = life.longest_gap
    return entry(life, now) | {
        "object": "request",
        "fingerprint": life.fingerprint,
        "error": None if life.error is None else {"code": life.error.error_code, "message": life.error.message},
        "priority": life.priority,
        "longest_gap_cause": None if gap is None else gap.cause,
        "summary": {name: _rounded(value) for name, value in life.summary().items()},
        "events": [{"kind": "received", "at_s": 0.0}, *_events(life.events, life.arrived)],
        "choices": [_choice(index, choice, life, now) for index, choice in enumerate(life.choices)],
    }


def entry(life: Life, now: float) -> dict[str, Any]:
    """What a list shows of it."""
    summary = life.summary()
    return {
        "id": life.id,
        "request_id": life.request_id,
        "endpoint": life.endpoint,
        "model": life.model,
        "state": life.state,
        "arrived_at": round(life.arrived_wall, 3),
        "elapsed_s": _rounded((now if life.ended is None else life.ended) - life.arrived),
        "stream": life.is_stream,
        "n": life.n,
        "prompt_tokens": life.num_prompt_tokens,
        "completion_tokens": life.num_tokens,
        "cached_tokens": life.cached_tokens,
        "time_to_first_token_s": _rounded(summary.get("time_to_first_token_s")),
        "longest_gap_s": _rounded(summary.get("longest_gap_s")),
        "num_resumes": summary["num_resumes"],
        "replica": life.replica,
        "error_code": None if life.error is None else life.error.error_code,
    }


def _choice(index: int, choice: ChoiceLife, life: Life, now: float) -> dict[str, Any]:
    gap = choice.longest_gap
    return {
        "index": index,
        "state": choice.state,
        "finish_reason": choice.finish_reason or None,
        "replica": choice.replica,
        "num_tokens": choice.num_tokens,
        "num_events_left_out": choice.num_events_left_out,
        "longest_gap": None if gap is None else {"for_s": _rounded(gap.seconds), "cause": gap.cause},
        "events": _events(choice.events + choice.present(now), life.arrived),
    }


def _events(events: Sequence[Event], arrived: float) -> list[dict[str, Any]]:
    found = []
    for event in sorted(events, key=lambda event: event.at):  # what lasted was written when it ended
        item: dict[str, Any] = {"kind": event.kind, "at_s": _rounded(event.at - arrived)}
        if event.until != event.at:
            item["for_s"] = _rounded(event.seconds)
        found.append(item | {key: _rounded(value) for key, value in event.detail.items()})
    return found


def _rounded(value: float | int | str | None) -> float | int | str | None:
    return round(value, 6) if isinstance(value, float) else value
