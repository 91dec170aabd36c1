"""When requests are meant to be sent. Open loop: the times are fixed before the first answer is known.

A process whose rate changes (step, ramp, diurnal) is a Poisson process by inversion: arrivals of rate 1 on the axis
of the cumulative rate, each mapped back to its time. The same seed gives the same times, in every worker.
"""

from __future__ import annotations

import bisect
import csv
import datetime
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loadtest import spec
from loadtest.spec import SpecError

KINDS: dict[str, tuple[str, ...]] = {
    "constant": ("rate",),
    "poisson": ("rate",),
    "gamma": ("rate", "cv"),
    "step": ("rates", "every"),
    "ramp": ("to", "from", "over"),
    "diurnal": ("rate", "swing", "period"),
    "trace": ("file", "speed", "unit"),
    "closed": ("users", "think"),
}
MAX_TRACE_LINES = 5_000_000

_TIME_NAMES = ("t_s", "timestamp", "TIMESTAMP", "time", "arrived_at")
_PROMPT_NAMES = ("prompt_tokens", "input_length", "ContextTokens", "num_prefill_tokens")
_OUTPUT_NAMES = ("output_tokens", "output_length", "GeneratedTokens", "num_decode_tokens")


class Arrival(NamedTuple):
    """One intended send."""

    at_s: float
    """Seconds since the run's start."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """Lengths that a trace prescribes."""


class Arrivals:
    """An open-loop process, or `closed`, which has no times."""

    def __init__(self, text: str) -> None:
        """text: e.g. `poisson:5`, `gamma:rate=5,cv=3`, `step:rates=1/2/4,every=30`, `trace:requests.jsonl`.

        Raises SpecError.
        """
        self.text = text
        what = "--arrivals"
        self.kind, values = spec.parse(text, KINDS, what)
        self.trace: list[Arrival] = []
        self.steps: list[tuple[float, float]] = []
        """(start, rate) of each step."""
        self.num_users = 0
        self.think_s = 0.0
        self.length_s = math.inf
        """Of a process that ends by itself."""
        self.file: Path | None = None
        if self.kind == "closed":
            self.num_users = int(spec.number(values, "users", None, what, above=0))
            self.think_s = spec.number(values, "think", 0.0, what, above=-1e-9)
        elif self.kind == "trace":
            self.file = Path(values.get("file", ""))
            speed = spec.number(values, "speed", 1.0, what, above=0)
            self.trace = read_trace(self.file, values.get("unit", "s"), speed)
            self.length_s = self.trace[-1].at_s
        elif self.kind == "step":
            every = spec.number(values, "every", None, what, above=0)
            rates = [spec.positive(rate, f"{what}: rates", -1e-12) for rate in values.get("rates", "").split("/")]
            self.steps = [(at * every, rate) for at, rate in enumerate(rates)]
            self.length_s = every * len(rates)
        elif self.kind == "ramp":
            self._low = spec.number(values, "from", 0.0, what, above=-1e-12)
            self._high = spec.number(values, "to", None, what, above=-1e-12)
            self._over = self.length_s = spec.number(values, "over", None, what, above=0)
        else:
            self._rate = spec.number(values, "rate", None, what, above=0)
            self._cv = spec.number(values, "cv", 2.0, what, above=0)
            self._swing = spec.number(values, "swing", 0.5, what, above=-1e-12)
            self._period = spec.number(values, "period", 86400.0, what, above=0)
            if self._swing > 1:
                raise SpecError(f"{what}: swing must be at most 1, got {self._swing:g}")

    @property
    def is_open(self) -> bool:
        return self.kind != "closed"

    def times(self, seed: int) -> Iterator[Arrival]:
        """Arrivals in order, from 0 on; without end unless the process has one."""
        if self.kind == "trace":
            return iter(self.trace)
        return itertools.takewhile(lambda arrival: arrival.at_s < self.length_s, map(Arrival, self._times(seed)))

    def _times(self, seed: int) -> Iterator[float]:
        draw = random.Random(f"argosy:{seed}:arrivals")
        if self.kind == "constant":
            return (n / self._rate for n in itertools.count())
        if self.kind == "poisson":
            return itertools.accumulate(draw.expovariate(self._rate) for _ in itertools.count())
        if self.kind == "gamma":
            # Gaps of mean 1/rate and standard deviation cv/rate.
            shape = 1 / self._cv**2
            scale = 1 / (self._rate * shape)
            return itertools.accumulate(draw.gammavariate(shape, scale) for _ in itertools.count())
        steps = itertools.accumulate(draw.expovariate(1.0) for _ in itertools.count())
        if self.kind == "diurnal":
            return (invert(self._of_day, target, target / self._rate, self._period) for target in steps)
        if self.kind == "ramp":
            return itertools.takewhile(math.isfinite, (self._on_ramp(target) for target in steps))
        return itertools.takewhile(math.isfinite, (self._on_steps(target) for target in steps))

    def _of_day(self, at: float) -> float:
        """Arrivals expected until `at`: the rate is lowest at 0, highest half a period later."""
        turn = 2 * math.pi / self._period
        return self._rate * (at - self._swing * math.sin(turn * at) / turn)

    def _on_ramp(self, target: float) -> float:
        slope = (self._high - self._low) / self._over
        if slope == 0:
            return target / self._low if self._low else math.inf
        inner = self._low**2 + 2 * slope * target
        return math.inf if inner < 0 else (math.sqrt(inner) - self._low) / slope

    def _on_steps(self, target: float) -> float:
        every = self.length_s / len(self.steps)
        before = list(itertools.accumulate((rate * every for _, rate in self.steps), initial=0.0))
        at = bisect.bisect_right(before, target) - 1
        if at >= len(self.steps):
            return math.inf
        start, rate = self.steps[at]
        return start + (target - before[at]) / rate


def invert(rising: Callable[[float], float], target: float, guess: float, width: float) -> float:
    """Where a rising function reaches `target`, by bisection around a guess that is at most `width` off."""
    low, high = max(guess - width, 0.0), guess + width
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return high


def read_trace(path: Path, unit: str = "s", speed: float = 1.0) -> list[Arrival]:
    """A recorded trace: JSON lines or CSV with a header, times in seconds (`unit` ms) or as ISO dates.

    Times are counted from the first, divided by `speed`, and sorted. Raises SpecError naming the line.
    """
    if unit not in ("s", "ms"):
        raise SpecError(f"--arrivals: trace: unit is s or ms, got {unit!r}")
    arrivals = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows: Iterator[Any] = csv.DictReader(file) if path.suffix == ".csv" else _filled(file)
            for number, row in enumerate(rows, 1):
                if number > MAX_TRACE_LINES:
                    raise SpecError(f"trace {path}: more than {MAX_TRACE_LINES} lines")
                try:
                    row = _object(row)
                    at = _time(_first(row, _TIME_NAMES)) * (0.001 if unit == "ms" else 1.0)
                    prompt, output = _first(row, _PROMPT_NAMES), _first(row, _OUTPUT_NAMES)
                    lengths = [None if value in (None, "") else max(int(float(value)), 1) for value in (prompt, output)]
                    arrivals.append(Arrival(at, *lengths))
                except (TypeError, ValueError, OverflowError) as error:
                    raise SpecError(f"trace {path}: line {number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"trace {path}: {error}") from None
    if not arrivals:
        raise SpecError(f"trace {path}: no arrivals; each line needs one of {', '.join(_TIME_NAMES)}")
    start = min(arrival.at_s for arrival in arrivals)
    arrivals = [arrival._replace(at_s=(arrival.at_s - start) / speed) for arrival in arrivals]
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _filled(file: Any) -> Iterator[str]:
    return (line for line in file if line.strip())


def _object(row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        row = json.loads(row)
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {str(row)[:60]}")
    return row


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _time(value: Any) -> float:
    if value is None:
        raise ValueError(f"none of {', '.join(_TIME_NAMES)}")
    try:
        at = float(value)
    except ValueError:
        at = datetime.datetime.fromisoformat(value[:26]).replace(tzinfo=datetime.UTC).timestamp()
    if not math.isfinite(at):
        raise ValueError(f"time {value!r}")
    return at
