"""Server-sent events: bytes in, events out, by the rules of the WHATWG's standard.

Lines end with LF, CRLF or CR, and the bytes may be cut anywhere. An event's data lines are joined by LF; comments
come out at once, for a server speaks to its operators through them. What a stream may hold back is bounded.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_EVENT_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


class SseError(ValueError):
    """An event or a line longer than the parser's bound."""


class Event(NamedTuple):
    """A complete event, or a comment line (then `data` is its text)."""

    data: bytes
    is_comment: bool = False
    name: bytes = b""
    id: bytes = b""


class SseParser:
    """State between the pieces of one stream."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        """max_event_bytes: bound on one event, and on one line that has not ended."""
        self._max_bytes = max_event_bytes
        self._pieces: list[bytes] = []  # of a line that has not ended
        self._pieces_bytes = 0
        self._data: list[bytes] = []  # of an event that has not ended
        self._data_bytes = 0
        self._name = b""
        self._id = b""
        self._is_first = True
        self._is_after_cr = False  # the last piece ended with CR: an LF that follows belongs to it

    def feed(self, data: bytes) -> list[Event]:
        """Events and comments that `data` completes. Raises SseError beyond the bound."""
        if self._is_after_cr and data:
            self._is_after_cr = False
            if data.startswith(b"\n"):
                data = data[1:]
        if b"\r" in data:
            self._is_after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        rest = lines.pop()
        if not lines:
            self._hold(rest)
            return []
        if self._pieces:
            self._pieces.append(lines[0])
            lines[0] = b"".join(self._pieces)
            self._pieces.clear()
            self._pieces_bytes = 0
        events: list[Event] = []
        if self._is_first:
            self._is_first = False
            lines[0] = lines[0].removeprefix(_BOM)
        for line in lines:
            if line:
                self._take(line, events)
            else:
                if self._data:
                    events.append(Event(b"\n".join(self._data), False, self._name, self._id))
                    self._data = []
                    self._data_bytes = 0
                self._name = b""
        self._hold(rest)
        return events

    @property
    def is_between_events(self) -> bool:
        """Whether a stream that ends here has lost nothing."""
        return not self._data and not self._pieces

    def _hold(self, piece: bytes) -> None:
        if piece:
            self._pieces.append(piece)
            self._pieces_bytes += len(piece)
            if self._pieces_bytes > self._max_bytes:
                raise SseError(f"a line of more than {self._max_bytes} bytes")

    def _take(self, line: bytes, events: list[Event]) -> None:
        if line.startswith(b":"):
            events.append(Event(line[1:].removeprefix(b" "), True))
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data_bytes += len(value) + 1
            if self._data_bytes > self._max_bytes:
                raise SseError(f"an event of more than {self._max_bytes} bytes")
            self._data.append(value)
        elif field == b"event":
            self._name = value
        elif field == b"id" and b"\0" not in value:
            self._id = value
