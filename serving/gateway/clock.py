"""Time and names, injected so that tests fix both."""

from __future__ import annotations

import dataclasses
import re
import secrets
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """wall: unix seconds, for `created` only. monotonic: seconds, for every wait and deadline."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def steady(self) -> Callable[[], int]:
        """Unix seconds that never run backwards, whatever the wall clock does later."""
        offset = self.wall() - self.monotonic()
        return lambda: int(offset + self.monotonic())


class Ids:
    """Names of requests; they begin with their gateway process, so that any other can forward (C24)."""

    def __init__(self, gateway: str, draw: Callable[[int], int] = secrets.randbits) -> None:
        number = re.search(r"(\d+)$", gateway)
        self._process = f"{int(number.group(1)) % 256 if number else 0:02x}"
        self._draw = draw

    def request(self, prefix: str) -> str:
        """`prefix-<2 hex digits of the process><24 random hex digits>`."""
        return f"{prefix}-{self._process}{self._draw(96):024x}"

    def seed(self) -> int:
        """uint64 for a request that brought none."""
        return self._draw(64)
