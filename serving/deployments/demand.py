"""What waits in all gateways, as the directory holds it: the latest report of each, for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from serving.demand import MAX_REPORT_BYTES, MAX_SKEW_S, DemandReport, is_signed
from serving.errors import SettingsError
from serving.secret_file import shared_secrets

EXPIRE_S: Final = 5.0
MAX_GATEWAYS: Final = 1024
MAX_MODELS: Final = 64
MAX_COUNT: Final = 1 << 40
GROWTH: Final = 1.5
"""News are a demand that came, went, or changed by this factor."""

_decoder = msgspec.json.Decoder(DemandReport)


class HeldDemand:
    """Reports by gateway. clock: monotonic seconds, wall: unix seconds."""

    def __init__(
        self,
        secret_file: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """secret_file: "" = nobody can sign, and every report is refused."""
        self._secret_file = secret_file
        self._clock = clock
        self._wall = wall
        self._secrets: tuple[bytes, ...] = ()
        self._secrets_of: tuple[int, int] | None = None  # the file's version
        self._reports: dict[str, tuple[DemandReport, float]] = {}
        self._told = 0  # choices, when there last were news

    def take(self, body: bytes, proof: str) -> bool:
        """A report has come; whether it was news.

        Raises PermissionError when it is not signed or too old, ValueError when it is no report or there are too many.
        """
        if len(body) > MAX_REPORT_BYTES:
            raise ValueError(f"a report has {MAX_REPORT_BYTES} bytes at most, not {len(body)}")
        if not is_signed(self._known_secrets(), body, proof):
            raise PermissionError("the report is not signed with the engine secret")
        report = _decoder.decode(body)
        late_s = self._wall() - report.sent_at
        if not abs(late_s) <= MAX_SKEW_S:
            raise PermissionError(f"the report was sent {late_s:.0f} s ago, the limit is {MAX_SKEW_S:.0f} s either way")
        counts = [*report.choices.values(), *report.tokens.values()]
        if len(report.choices) > MAX_MODELS or len(report.tokens) > MAX_MODELS:
            raise ValueError(f"a report names {MAX_MODELS} models at most")
        if any(not 0 <= count <= MAX_COUNT for count in counts):
            raise ValueError(f"a count is outside 0 to {MAX_COUNT:,}")
        now = self._clock()
        self._expire(now)
        old = self._reports.get(report.gateway)
        if old is None and len(self._reports) >= MAX_GATEWAYS:
            raise ValueError(f"the limit of {MAX_GATEWAYS} gateways has been reached")
        if old is not None and old[0].sent_at >= report.sent_at:
            raise PermissionError("a report that was sent later has come already")
        self._reports[report.gateway] = (report, now)
        return self._is_news()

    def total(self, model: str) -> tuple[int, int, float] | None:
        """(choices, tokens, age of the oldest report in seconds) of a model; None while no gateway has told."""
        now = self._clock()
        self._expire(now)
        if not self._reports:
            return None
        reports = [report for report, _ in self._reports.values()]
        return (
            sum(report.choices.get(model, 0) for report in reports),
            sum(report.tokens.get(model, 0) for report in reports),
            max(now - heard for _, heard in self._reports.values()),
        )

    @property
    def num_choices(self) -> int:
        """That wait, of all models."""
        self._expire(self._clock())
        return sum(sum(report.choices.values()) for report, _ in self._reports.values())

    def _is_news(self) -> bool:
        choices = self.num_choices
        low, high = sorted((choices, self._told))
        if low == high or (low and high < low * GROWTH):
            return False
        self._told = choices
        return True

    def _expire(self, now: float) -> None:
        for name in [name for name, (_, heard) in self._reports.items() if now - heard > EXPIRE_S]:
            del self._reports[name]

    def _known_secrets(self) -> tuple[bytes, ...]:
        """Read again when the file has changed; an unreadable one changes nothing."""
        if not self._secret_file:
            return ()
        try:
            facts = Path(self._secret_file).stat()
            version = facts.st_mtime_ns, facts.st_ino
            if version != self._secrets_of:
                self._secrets = shared_secrets(self._secret_file)
                self._secrets_of = version
        except (OSError, SettingsError):
            pass
        return self._secrets
