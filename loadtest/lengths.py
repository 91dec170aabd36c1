"""How many tokens: fixed, log-normal or uniform."""

from __future__ import annotations

import math
import random

from loadtest import spec
from loadtest.spec import SpecError

KINDS: dict[str, tuple[str, ...]] = {
    "fixed": ("tokens",),
    "lognormal": ("median", "sigma", "min", "max"),
    "uniform": ("min", "max"),
}
MAX_TOKENS = 10_000_000


class Length:
    """A distribution over whole numbers of tokens from 1 on."""

    def __init__(self, text: str, what: str) -> None:
        """text: `64`, `lognormal:median=256,sigma=0.8,min=16,max=2048` or `uniform:min=16,max=64`; what: for messages.

        Raises SpecError.
        """
        self.text = text
        self.kind, values = spec.parse(text if ":" in text else f"fixed:{text}", KINDS, what)
        if self.kind == "fixed":
            self.low = self.high = int(spec.number(values, "tokens", None, what, above=0))
        else:
            self.low = int(spec.number(values, "min", 1 if self.kind == "lognormal" else None, what, above=0))
            self.high = int(spec.number(values, "max", None if self.kind == "uniform" else 1e6, what, above=0))
        if not 1 <= self.low <= self.high <= MAX_TOKENS:
            raise SpecError(f"{what}: 1 ≤ min ≤ max ≤ {MAX_TOKENS}, got {self.low} and {self.high}")
        if self.kind == "lognormal":
            self._median = spec.number(values, "median", None, what, above=0)
            self._sigma = spec.number(values, "sigma", 0.8, what, above=0)

    def draw(self, draw: random.Random) -> int:
        """A length; a log-normal one is drawn again, at most 64 times, until it lies within the bounds."""
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return draw.randint(self.low, self.high)
        value = 0
        for _ in range(64):
            value = round(math.exp(draw.gauss(math.log(self._median), self._sigma)))
            if self.low <= value <= self.high:
                return value
        return min(max(value, self.low), self.high)
