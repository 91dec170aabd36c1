"""One log line per generation request, written once when its life ends.

It says who asked (by ids), what came of it and where the time went, of `serving.logs.FIELDS` and nothing else: no
prompt, no output, no header but the bounded x-request-id, and of an error its code, not its words. As JSON every
request has its line; in text, for people, only failures of ours and requests slower than `slow_request_s` have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from serving.gateway.life import Life
from serving.logs import Allowance

logger = logging.getLogger("argosy.request")

SUMMARY_S: Final = 10.0
"""How long lines that were left out stay untold."""
CLIENT_LEFT: Final = 499
"""As a status: nobody was left to answer."""


class RequestLog:
    """The lines of one gateway process. Refused requests have an allowance of their own: nonsense must not
    crowd out what was served."""

    def __init__(self, log_format: str, slow_request_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._is_json = log_format == "json"
        self._slow_request_s = slow_request_s
        self._monotonic = monotonic
        served, refused = ((200.0, 2000), (10.0, 200)) if self._is_json else ((2.0, 20), (1.0, 10))
        self._served = Allowance(*served)
        self._refused = Allowance(*refused)
        self._num_left_out = 0
        self._summary: asyncio.TimerHandle | None = None

    def on_end(self, life: Life, trace_id: str = "") -> None:
        """Write its line, if it gets one. trace_id: of its spans, "" when there are none. Never waits."""
        status = status_of(life)
        seconds = (life.ended or life.arrived) - life.arrived
        if not self._is_json and status < 500 and seconds < self._slow_request_s:
            return
        allowance = self._refused if life.state == "refused" else self._served
        if not allowance.take(self._monotonic()):
            self._leave_out()
            return
        fields = fields_of(life) | {"trace_id": trace_id}
        level = logging.WARNING if status >= 500 else logging.INFO
        if self._is_json:
            logger.log(level, "request", extra={"fields": fields})
        else:
            logger.log(level, "%s", _sentence(fields))

    def close(self) -> None:
        """Tell what was left out and is untold."""
        if self._summary is not None:
            self._summary.cancel()
            self._summarise()

    def _leave_out(self) -> None:
        self._num_left_out += 1
        if self._summary is None:
            self._summary = asyncio.get_running_loop().call_later(SUMMARY_S, self._summarise)

    def _summarise(self) -> None:
        self._summary, number, self._num_left_out = None, self._num_left_out, 0
        fields = {"event": "requests_left_out", "left_out": number}
        logger.warning("%d requests had no line of their own", number, extra={"fields": fields})


def status_of(life: Life) -> int:
    """The HTTP status of the reply, or of the error that broke it off; 499 when the client went first."""
    if life.error is not None:
        return life.error.status
    return CLIENT_LEFT if life.has_left else 200


def fields_of(life: Life) -> dict[str, Any]:
    """What the line says; absent = not known."""
    summary = life.summary()
    fields: dict[str, Any] = {
        "event": "request",
        "id": life.id,
        "request_id": life.request_id,
        "endpoint": life.endpoint,
        "model": life.model,
        "state": life.state,
        "status": status_of(life),
        "prompt_tokens": life.num_prompt_tokens,
        "completion_tokens": life.num_tokens,
        "cached_tokens": life.cached_tokens,
        "e2e_ms": _ms((life.ended or life.arrived) - life.arrived),
        "resumes": summary["num_resumes"],
        "preemptions": summary["num_preemptions"],
        "replica": life.replica,
    }
    if life.error is not None:
        fields["error_code"] = life.error.error_code
    reasons = sorted({choice.finish_reason for choice in life.choices if choice.finish_reason})
    if reasons:
        fields["finish_reason"] = ",".join(reasons)
    for name, seconds in (("ttft", "time_to_first_token_s"), *((part, f"{part}_s") for part in _PARTS)):
        if seconds in summary:
            fields[f"{name}_ms"] = _ms(summary[seconds])
    gap = life.longest_gap
    if gap is not None:
        fields |= {"longest_gap_ms": _ms(gap.seconds), "longest_gap_cause": gap.cause}
    return fields


_PARTS: Final = ("queue", "prefill", "decode")


def _ms(seconds: float) -> float:
    return round(1000.0 * seconds, 3)


def _sentence(fields: dict[str, Any]) -> str:
    """The same for people."""
    how = f"{fields['state']}, {fields['status']}" + (f" {fields['error_code']}" if "error_code" in fields else "")
    times = ", ".join(
        f"{name} {fields[f'{name}_ms'] / 1000.0:.2f} s" for name in ("ttft", *_PARTS) if f"{name}_ms" in fields
    )
    gap = ""
    if "longest_gap_ms" in fields:
        gap = f"; longest gap {fields['longest_gap_ms'] / 1000.0:.2f} s ({fields['longest_gap_cause']})"
    return (
        f"request {fields['id'] or fields['request_id']} {fields['endpoint']}: {how} after "
        f"{fields['e2e_ms'] / 1000.0:.2f} s with {fields['prompt_tokens']} + {fields['completion_tokens']} tokens"
        + (f" ({times})" if times else "")
        + gap
    )
