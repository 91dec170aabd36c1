"""Outputs of keyed rows, kept for whoever asks with `find` when their gateway has gone (C22).

They are kept from the first token on: what was written to a dying connection may not have been read.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import OrderedDict

from serving.engine.output import StepOutput
from serving.wire import Submit

HOLD_S = 60.0
MAX_HELD_BYTES = 64 << 20

Key = tuple[int, int]  # (connection, handle) under which the row was submitted


@dataclasses.dataclass(slots=True)
class HeldRow:
    """A keyed row: it runs on when its reader goes."""

    key: Key
    submit: Submit
    first_position: int  # output index of tokens[0]
    until_s: float = math.inf  # known once the row has no reader or is over
    tokens: array[int] = dataclasses.field(default_factory=lambda: array("I"))
    logprobs: dict[int, bytes] = dataclasses.field(default_factory=dict)  # by index into tokens
    finished: tuple[int, int] | None = None  # (FinishReason, stop id or -1)
    num_bytes: int = 1024  # an empty row's, roughly
    is_moving: bool = False  # on its way to another connection


class HeldRows:
    """Bounded by time and bytes; the oldest are dropped first."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._rows: OrderedDict[Key, HeldRow] = OrderedDict()
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def hold(self, row: HeldRow) -> None:
        self._rows[row.key] = row
        self._num_bytes += row.num_bytes

    def keep(self, output: StepOutput, until_s: float) -> None:
        """Note the outputs of keyed rows, read or not; a row that is over is held `until_s`."""
        if not self._rows:
            return
        keys = zip(output.connections.tolist(), output.handles.tolist(), strict=True)
        for at, key in enumerate(keys):
            row = self._rows.get(key)
            if row is not None:
                self._append(row, int(output.tokens[at]), output.logprobs.get(at))
        for connection, handle, reason, stop_id in output.finished:
            row = self._rows.get((connection, handle))
            if row is not None:
                row.finished = (int(reason), stop_id)
                row.until_s = until_s
        for key in output.failed:
            self.take(key)

    def _append(self, row: HeldRow, token: int, logprobs: bytes | None) -> None:
        if logprobs is not None:
            row.logprobs[len(row.tokens)] = logprobs
        row.tokens.append(token)
        size = 4 + len(logprobs or b"")
        row.num_bytes += size
        self._num_bytes += size

    def orphan(self, key: Key, until_s: float) -> None:
        """The row's reader has gone."""
        row = self._rows.get(key)
        if row is not None:
            row.until_s = min(row.until_s, until_s)

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
        dropped = [row for row in self._rows.values() if row.until_s <= now_s]
        for row in dropped:
            self.take(row.key)
        while self._num_bytes > self._max_bytes:
            oldest = next((row for row in self._rows.values() if row.until_s < math.inf), None)
            if oldest is None:
                break
            self.take(oldest.key)
            dropped.append(oldest)
        return dropped
