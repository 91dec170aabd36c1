"""What locust's own tables show: one row per kind of figure and kind of request.

    E2E         intended send to end        the only rows that count as requests (and in "Aggregated")
    TTFT        intended send to first output
    ITL         every gap between events with output
    TPOT        time per output token after the first
    TOKENS-IN, TOKENS-OUT                   tokens, in the columns that say ms
    QUEUE       longest wait that the server's comments named

Streams have all rows, whole answers E2E and TOKENS. A failure is a failure of its E2E row, under one of the few words
of loadtest/failures.py with the server's error code.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from loadtest.call import Answer
from loadtest.failures import CANCELLED

E2E = "E2E"


def fire(environment: Any, answer: Answer) -> None:
    """Enter an answer into a locust Environment's statistics; listeners of its `request` event hear the E2E row."""
    name, intended_at = answer.call.row, answer.intended_at
    if answer.failure is not None and answer.failure.failure == CANCELLED:
        return
    end_at = answer.end_at if answer.end_at is not None else intended_at
    environment.events.request.fire(
        request_type=E2E,
        name=name,
        response_time=1e3 * (end_at - intended_at),
        response_length=0,
        exception=answer.failure,
        context={"id": answer.call.id, "tenant": answer.call.tenant},
        start_time=intended_at,
        url="",
        response=None,
    )
    stats = environment.stats  # rows of their own: through the event they would count as requests
    times = answer.token_times
    if answer.first_token_at is not None:
        stats.get(name, "TTFT").log(1e3 * (answer.first_token_at - intended_at), 0)
    if len(times) > 1:
        gaps = stats.get(name, "ITL")
        for earlier, later in pairwise(times):
            gaps.log(1e3 * (later - earlier), 0)
    if answer.usage is not None:
        num_in, num_out = answer.usage.prompt_tokens, answer.usage.completion_tokens
        if num_out is not None and num_out > 1 and len(times) > 1:
            stats.get(name, "TPOT").log(1e3 * (times[-1] - times[0]) / (num_out - 1), 0)
        if num_in is not None:
            stats.get(name, "TOKENS-IN").log(num_in, 0)
        if num_out is not None:
            stats.get(name, "TOKENS-OUT").log(num_out, 0)
    if answer.queue_wait_s is not None:
        stats.get(name, "QUEUE").log(1e3 * answer.queue_wait_s, 0)
