"""Lives as the data plane writes them, made in a test: ended, at times of the test's choosing."""

from __future__ import annotations

import random

from serving.errors import ArgosyError, EngineError, ModelNotFound, NoCapacity
from serving.gateway.choice_life import ChoiceLife
from serving.gateway.life import Life
from serving.gateway.steps import StepLog
from serving.types import Note, StepRecord, Wait

ARRIVED = 100.0
ARRIVED_WALL = 1_700_000_000.0


def a_life(
    *, n: int = 1, error: ArgosyError | None = None, seconds: float = 1.0, trace: tuple[str, str] = ("", "")
) -> Life:
    """A request that waited 0.1 s, whose first token came after 0.3 s and that was resumed after 0.5 s."""
    life = begun(trace)
    if error is not None and error.status in (400, 404):
        life.end(ARRIVED + seconds, error, has_left=False)
        return life
    life.id, life.model, life.fingerprint, life.n = "cmpl-1", "tiny", "f00d", n
    life.num_prompt_tokens, life.is_stream = 12, True
    life.choices = [ChoiceLife() for _ in range(n)]
    for choice in life.choices:
        steps = StepLog()
        choice.queued(ARRIVED + 0.1, "no_permit", 3, 70)
        choice.sent(ARRIVED + 0.2, "replica-0", 0)
        choice.noted(Note.WAITED, Wait.SLOTS, steps.add(0, record(ARRIVED + 0.21), ARRIVED + 0.22))
        choice.admitted(ARRIVED + 0.22, 4)
        choice.noted(Note.CHUNK, 8, steps.add(1, record(ARRIVED + 0.25), ARRIVED + 0.26))
        choice.grew(ARRIVED + 0.3, 1, steps)
        choice.grew(ARRIVED + 0.35, 2, steps)
        choice.lost(ARRIVED + 0.5, "replica-0", "lost")
        choice.queued(ARRIVED + 0.5, "no_replica", 1, 0)
        choice.sent(ARRIVED + 0.6, "replica-1", 2)
        choice.grew(ARRIVED + 0.7, 3, steps)
        if error is None:
            choice.finish(ARRIVED + 0.8, "length", choice.num_tokens)
        else:
            choice.end(ARRIVED + 0.8, "failed", {"code": error.error_code})
    life.end(ARRIVED + seconds, error, has_left=False)
    return life


def begun(trace: tuple[str, str] = ("", "")) -> Life:
    life = Life("req-1", "/v1/completions", ARRIVED, ARRIVED_WALL, trace)
    life.did("read", ARRIVED, ARRIVED + 0.01)
    life.did("tokenised", ARRIVED + 0.01, ARRIVED + 0.02, tokens=12)
    return life


def refused() -> Life:
    return a_life(error=ModelNotFound("The model 'canary' does not exist.", param="model"), seconds=0.01)


def failed() -> Life:
    return a_life(error=EngineError("canary"), seconds=2.0)


def record(started_s: float, duration_s: float = 0.01) -> StepRecord:
    return StepRecord(started_s, duration_s, 0.05, None, 2, 8, 1, 0, 4)


def random_life(seed: int) -> Life:
    """Anything that may happen to a request, in an order in which it may happen."""
    draw = random.Random(seed)
    now = ARRIVED

    def later() -> float:
        nonlocal now
        now += draw.choice((0.0, 0.001, 0.05, 0.3, 2.0)) * draw.random()
        return now

    life = begun()
    now += 0.02
    life.id, life.n = "cmpl-1", draw.choice((1, 2, 20))
    life.choices = [ChoiceLife() for _ in range(life.n)]
    for choice in life.choices:
        steps, num_tokens, is_sent = StepLog(), 0, False
        for _ in range(draw.choice((0, 3, 30, 400))):
            kind = draw.choice(("queued", "sent", "returned", "lost", "note", "grew", "grew", "grew"))
            if kind == "queued":
                choice.queued(later(), "no_permit", 1, 5)
            elif kind == "sent":
                is_sent = True
                choice.sent(later(), f"replica-{draw.randrange(3)}", num_tokens)
            elif not is_sent:
                continue
            elif kind == "returned":
                choice.returned(later(), "overfull")
            elif kind == "lost":
                choice.lost(later(), "replica-0", draw.choice(("lost", "stalled")))
                is_sent = False
            elif kind == "note":
                duration_s = 0.01 * draw.random()
                step = steps.add(steps.last_number + 1, record(later(), duration_s), now + duration_s)
                choice.noted(draw.choice((Note.CHUNK, Note.PREEMPTED, Note.WAITED)), draw.choice((1, 2)), step)
            else:
                num_tokens += draw.randrange(1, 4)
                choice.grew(later(), num_tokens, steps)
        if draw.random() < 0.7:
            choice.finish(later(), "stop", choice.num_tokens)
    error = draw.choice((None, None, NoCapacity("full", reason="saturated"), EngineError("broken")))
    life.end(later(), error, has_left=draw.random() < 0.2)
    return life
