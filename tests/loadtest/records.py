"""Observations and runs for tests of what reads them, and a server that exists only as a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest.goodput import Objective
from loadtest.record import Comparison, GeneratorHealth, Line, Observation, RunEnd, RunHeader
from loadtest.summary import Summary, summarize
from loadtest.table import Floats, Recorded, gather


def make_header(**changes: Any) -> RunHeader:
    fields: dict[str, Any] = {
        "started_wall_s": 1_800_000_000.0,
        "target": "http://127.0.0.1:8000",
        "model": "tiny",
        "seed": 0,
    }
    return RunHeader(**(fields | changes))


def make_seen(id: int, at: float = 0.0, tokens: Sequence[float] = (), **changes: Any) -> Observation:
    """A stream meant to be sent at second `at` whose tokens came at `tokens`, counted from `at`."""
    times = [at + token for token in tokens]
    fields: dict[str, Any] = {
        "intended_s": at,
        "started_s": at,
        "first_token_s": times[0] if times else None,
        "token_times_s": times,
        "end_s": times[-1] if times else at,
        "prompt_tokens": 10,
        "output_tokens": len(times),
        "status": 200,
    }
    return Observation(id=id, **(fields | changes))


def make_run(
    observations: Sequence[Observation],
    *,
    is_valid: bool = True,
    comparisons: Sequence[Comparison] = (),
    more: Sequence[Line] = (),
    **header: Any,
) -> Recorded:
    end = RunEnd(
        duration_s=1.0,
        is_valid=is_valid,
        reasons=[] if is_valid else ["the generator lagged"],
        generator=GeneratorHealth(num_intended=len(observations), num_sent=len(observations)),
    )
    return gather([make_header(**header), *observations, *comparisons, *more, end])


def make_stream_of_requests(num: int, *, seed: int = 0, slowness: float = 1.0, num_tokens: int = 20) -> Recorded:
    """Poisson arrivals, TTFT of about 100 ms and gaps of about 20 ms, log-normal, times `slowness`."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(0.1, num))
    firsts = random.lognormal(-2.3, 0.3, num) * slowness
    gaps = random.lognormal(-3.9, 0.2, (num, num_tokens - 1)) * slowness
    times = firsts[:, None] + np.concatenate([np.zeros((num, 1)), np.cumsum(gaps, axis=1)], axis=1)
    return make_run([make_seen(i, float(arrivals[i]), times[i].tolist()) for i in range(num)])


def served_in_turn(arrivals: Floats, service: Floats) -> Floats:
    """[n] sojourn times of one server that takes requests in the order in which they arrive (Lindley)."""
    done = np.cumsum(service)
    slack = np.maximum.accumulate(arrivals - np.concatenate([[0.0], done[:-1]]))
    return np.asarray(slack + done - arrivals, dtype=np.float64)


def run_through(arrivals: Floats, sojourns: Floats, objective: Objective, **run: Any) -> Summary:
    """What a run comes to whose requests show their only token when they are done."""
    seen = [make_seen(i, float(at), [float(s)]) for i, (at, s) in enumerate(zip(arrivals, sojourns, strict=True))]
    return summarize(make_run(seen, **run), objective)
