"""Correctness under load: what was said in the crowd must be what is said alone."""

from __future__ import annotations

import time

import msgspec

from loadtest.call import Answer, Call, send
from loadtest.http import Pool
from loadtest.record import Comparison
from loadtest.tenants import Tenants


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A request of the run with what came back; kept in memory and never written."""

    call: Call
    text: str
    finish_reason: str | None
    logprobs: list[tuple[str, float | None]]


def sample(answer: Answer) -> Sample:
    return Sample(
        call=answer.call,
        text="".join(answer.text),
        finish_reason=answer.finish_reason,
        logprobs=answer.logprobs,
    )


def again(before: Sample, pool: Pool, tenants: Tenants) -> Comparison:
    """Send the very same bytes and compare. Blocks until the answer is there."""
    answer = Answer(before.call, time.monotonic())
    send(answer, pool, tenants.by_name[before.call.tenant].headers)
    if answer.failure is not None:
        return Comparison(id=before.call.id, is_equal=False, is_failed=True, difference=answer.failure.failure)
    difference = differ(before, sample(answer))
    return Comparison(
        id=before.call.id, is_equal=not difference, num_logprobs=len(before.logprobs), difference=difference
    )


def differ(first: Sample, second: Sample) -> str:
    """What differs first, "" = nothing. Says where, never what the text was."""
    for at, (ours, theirs) in enumerate(zip(first.logprobs, second.logprobs, strict=False)):
        if ours[0] != theirs[0]:
            return f"token {at}: another token"
        if ours[1] != theirs[1]:
            return f"token {at}: logprob {ours[1]} in the run, {theirs[1]} alone"
    if len(first.logprobs) != len(second.logprobs):
        return f"{len(first.logprobs)} tokens in the run, {len(second.logprobs)} alone"
    if first.text != second.text:
        pairs = zip(first.text, second.text, strict=False)
        at = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first.text), len(second.text)))
        return f"text from character {at} on"
    if first.finish_reason != second.finish_reason:
        return f"finish_reason {first.finish_reason} in the run, {second.finish_reason} alone"
    return ""
