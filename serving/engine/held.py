"""Outputs of rows whose gateway has gone, kept for whoever asks with `find` (C22)."""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict

from serving.wire import Submit

HOLD_S = 60.0
MAX_HELD_BYTES = 64 << 20

Key = tuple[int, int]  # (connection, handle) under which the row was submitted


@dataclasses.dataclass(slots=True)
class HeldRow:
    """A row that runs on without a reader."""

    key: Key
    submit: Submit
    first_position: int  # output index of tokens[0]
    until_s: float
    tokens: array[int] = dataclasses.field(default_factory=lambda: array("I"))
    logprobs: dict[int, bytes] = dataclasses.field(default_factory=dict)  # by index into tokens
    finished: tuple[int, int] | None = None  # (FinishReason, stop id or -1)
    num_bytes: int = 0


class HeldRows:
    """Bounded by time and bytes; the oldest are dropped first."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._rows: OrderedDict[Key, HeldRow] = OrderedDict()
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def hold(self, row: HeldRow) -> None:
        self._rows[row.key] = row

    def append(self, key: Key, token: int, logprobs: bytes | None) -> None:
        """An output of a held row. Outputs of rows that are not held are nobody's."""
        row = self._rows.get(key)
        if row is None:
            return
        if logprobs is not None:
            row.logprobs[len(row.tokens)] = logprobs
        row.tokens.append(token)
        size = 4 + len(logprobs or b"")
        row.num_bytes += size
        self._num_bytes += size

    def finish(self, key: Key, reason: int, stop_id: int) -> None:
        row = self._rows.get(key)
        if row is not None:
            row.finished = (reason, stop_id)

    def find(self, request_id: str, choice: int) -> HeldRow | None:
        for row in self._rows.values():
            if row.submit.request_id == request_id and row.submit.sampling.choice == choice:
                return row
        return None

    def take(self, key: Key) -> HeldRow | None:
        """Remove and return."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._num_bytes -= row.num_bytes
        return row

    def expire(self, now_s: float) -> list[HeldRow]:
        """Remove and return what has been held too long or does not fit; its rows are to be cancelled."""
        dropped = []
        while self._rows:
            oldest = next(iter(self._rows.values()))
            if oldest.until_s > now_s and self._num_bytes <= self._max_bytes:
                break
            self.take(oldest.key)
            dropped.append(oldest)
        return dropped
