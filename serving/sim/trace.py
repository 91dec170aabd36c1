"""A day of requests: a diurnal rate, bursts on top of it, and the moments at which replicas fail. Seeded."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Final

DAY_S: Final = 86400.0
NIGHT: Final = 0.15
"""The lowest rate of a day, as a share of its highest."""
PEAK_AT_S: Final = 15 * 3600.0
SPIKE_S: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One choice: when it comes, and its tokens."""

    at: float
    prompt: int
    output: int


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """arrivals in order of time; failures: when a running replica dies, and a number in [0, 1) that says which."""

    arrivals: list[Arrival]
    failures: list[tuple[float, float]]
    duration_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Burst:
    begin: float
    end: float
    factor: float


def day(
    seed: int,
    *,
    peak_per_s: float = 1.6,
    num_bursts: int = 10,
    num_spikes: int = 6,
    num_failures: int = 8,
    duration_s: float = DAY_S,
) -> Trace:
    """Poisson arrivals whose rate follows a day; bursts of three to fifteen minutes at two to three times the rate;
    spikes of 30 to 80 choices within two seconds. Lengths are log-normal (medians 300 and 250 tokens)."""
    rng = random.Random(seed)
    bursts = []
    for _ in range(num_bursts):
        begin = rng.uniform(0.0, duration_s)
        bursts.append(_Burst(begin, begin + rng.uniform(180.0, 900.0), rng.uniform(2.0, 3.0)))
    ceiling = peak_per_s * 3.0
    times = []
    now = 0.0
    while (now := now + rng.expovariate(ceiling)) < duration_s:
        if rng.random() * ceiling < min(rate_at(now, peak_per_s, bursts), ceiling):
            times.append(now)
    for _ in range(num_spikes):
        begin = rng.uniform(0.0, duration_s - SPIKE_S)
        times += [begin + rng.uniform(0.0, SPIKE_S) for _ in range(rng.randint(30, 80))]
    arrivals = [Arrival(at, _length(rng, 300.0, 4000), _length(rng, 250.0, 2000)) for at in sorted(times)]
    failures = sorted((rng.uniform(0.0, duration_s), rng.random()) for _ in range(num_failures))
    return Trace(arrivals, failures, duration_s)


def rate_at(now: float, peak_per_s: float, bursts: list[_Burst]) -> float:
    """Choices per second."""
    wave = (1.0 + math.cos(2.0 * math.pi * (now - PEAK_AT_S) / DAY_S)) / 2.0
    rate = peak_per_s * (NIGHT + (1.0 - NIGHT) * wave)
    for burst in bursts:
        if burst.begin <= now < burst.end:
            rate *= burst.factor
    return rate


def _length(rng: random.Random, median: float, most: int) -> int:
    return min(max(int(median * math.exp(rng.gauss(0.0, 0.7))), 1), most)
