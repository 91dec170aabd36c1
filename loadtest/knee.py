"""The knee: the highest rate of requests at which a server still keeps its promise.

Bracketing and bisection over open-loop runs. The rate doubles until a run breaks the promise (or halves until one keeps
it), then the gap between the highest rate that held and the lowest that broke is cut in its geometric middle until the
two are within `precision`. A verdict on a rate is the majority of `repeats` runs, decided as soon as it cannot change.
The server rests between runs, twice as long after one that broke, because its queue has to drain.

A run whose generator could not keep up says nothing about the server: the rate counts as out of reach, and the result
says that the generator was the limit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

from loadtest.summary import Summary

Reason = Literal["found", "generator", "max_rate", "min_rate", "max_runs", "max_s"]

REASONS: dict[Reason, str] = {
    "found": "the rates that held and broke are within the precision asked for",
    "generator": "the load generator could not keep up beyond this rate: the server may hold more",
    "max_rate": "the highest rate allowed still held: the server may hold more",
    "min_rate": "even the lowest rate allowed broke the promise",
    "max_runs": "stopped after the number of runs allowed",
    "max_s": "stopped after the time allowed",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search. Raises ValueError naming what is wrong."""

    start_rate: float = 1.0  # requests/s
    min_rate: float = 0.01
    max_rate: float = 10_000.0
    min_share: float = 0.99  # of the requests offered that must be within the objective
    precision: float = 0.05  # of the rate
    repeats: int = 1
    max_runs: int = 40
    max_s: float = math.inf
    cool_down_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.min_rate <= self.start_rate <= self.max_rate < math.inf:
            raise ValueError(
                "rates must obey 0 < min_rate <= start_rate <= max_rate, "
                f"not {self.min_rate:g}, {self.start_rate:g}, {self.max_rate:g}"
            )
        if not 0 < self.min_share <= 1:
            raise ValueError(f"min_share must be above 0 and at most 1, not {self.min_share:g}")
        if not 0.001 <= self.precision <= 1:
            raise ValueError(f"precision must be from 0.001 to 1, not {self.precision:g}")
        if not 1 <= self.repeats <= 99 or self.repeats % 2 == 0:
            raise ValueError(f"repeats must be odd, so that there is a majority, and from 1 to 99, not {self.repeats}")
        if self.max_runs < 1 or not self.max_s > 0 or not self.cool_down_s >= 0:
            raise ValueError(
                "max_runs must be at least 1, max_s above 0 and cool_down_s at least 0, "
                f"not {self.max_runs}, {self.max_s:g}, {self.cool_down_s:g}"
            )


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the search."""

    rate: float  # requests/s asked for
    summary: Summary
    has_held: bool


@dataclasses.dataclass(frozen=True)
class Knee:
    """What a search found: `rate` requests/s held (0: none did) and `broken_at` did not (inf: none was tried)."""

    rate: float
    broken_at: float
    reason: Reason
    settings: SearchSettings
    trials: tuple[Trial, ...]  # as run

    def curve(self) -> list[Trial]:
        """The valid runs by rate: latency against throughput."""
        return sorted((trial for trial in self.trials if trial.summary.is_valid), key=lambda trial: trial.rate)


def find_knee(
    run: Callable[[float], Summary],
    settings: SearchSettings,
    *,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Knee:
    """Search with `run(rate in requests/s)`, which loads the server for a while and summarises under an objective.

    `on_trial` hears of each run when it ends. What `run` raises passes through.
    """
    search = _Search(run, settings, on_trial, sleep, clock)
    low, high, beyond = 0.0, math.inf, "found"
    for rate in search.rates():
        verdict = search.tried(rate)
        if verdict is None:
            break
        if verdict == "held":
            low = max(low, rate)
        else:
            high = min(high, rate)
            beyond = "generator" if verdict == "invalid" else "found"
        search.bounds = (low, high)
    reason = search.stopped or _reason(low, high, beyond)
    return Knee(low, high, reason, settings, tuple(search.trials))


def _reason(low: float, high: float, beyond: str) -> Reason:
    if beyond == "generator":
        return "generator"
    if low == 0.0:
        return "min_rate"
    return "max_rate" if high == math.inf else "found"


class _Search:
    """The runs made so far, and which rate comes next."""

    def __init__(
        self,
        run: Callable[[float], Summary],
        settings: SearchSettings,
        on_trial: Callable[[Trial], None],
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self.run, self.settings, self.on_trial, self.sleep, self.clock = run, settings, on_trial, sleep, clock
        self.trials: list[Trial] = []
        self.bounds = (0.0, math.inf)
        self.stopped: Reason | None = None
        self.until = clock() + settings.max_s

    def rates(self) -> Iterator[float]:
        """Rates to try, each chosen from the bounds as they are when it is asked for."""
        settings = self.settings
        yield settings.start_rate
        while True:
            low, high = self.bounds
            if low == 0.0:
                if high <= settings.min_rate:
                    return
                yield max(high / 2, settings.min_rate)
            elif high == math.inf:
                if low >= settings.max_rate:
                    return
                yield min(low * 2, settings.max_rate)
            elif high <= low * (1 + settings.precision):
                return
            else:
                yield math.sqrt(low * high)

    def tried(self, rate: float) -> Literal["held", "broke", "invalid"] | None:
        """The verdict of up to `repeats` runs at a rate; None where a stop rule came first."""
        enough = self.settings.repeats // 2 + 1
        held = broke = 0
        while held < enough and broke < enough:
            if len(self.trials) >= self.settings.max_runs:
                self.stopped = "max_runs"
                return None
            if self.clock() >= self.until:
                self.stopped = "max_s"
                return None
            self._rest()
            summary = self.run(rate)
            has_held = summary.is_valid and summary.all.goodput_share >= self.settings.min_share
            self.trials.append(Trial(rate, summary, has_held))
            self.on_trial(self.trials[-1])
            if not summary.is_valid:
                return "invalid"
            held, broke = held + has_held, broke + (not has_held)
        return "held" if held >= enough else "broke"

    def _rest(self) -> None:
        if self.trials and self.settings.cool_down_s:
            self.sleep(self.settings.cool_down_s * (1 if self.trials[-1].has_held else 2))
