"""Files brought into the page cache before they are read, in the order in which a dry run asked for them.

The layers of a model do not read a file from its beginning to its end, and a rank reads every row's own columns: the
system's guesses about what comes next fail at every tensor, and with columns at every row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from models.stored_tensor import StoredTensor

DISTANCE_BYTES = 64 << 20  # that are announced and not yet read
_PIECE_BYTES = 8 << 20


class ReadAhead:
    """`expect` everything in order, `begin`, then `advance` by what was read."""

    def __init__(self) -> None:
        self._expected: list[tuple[StoredTensor, range, range | None]] = []
        self._pieces: Iterator[int] = iter(())
        self._ahead_bytes = 0  # announced and not yet read

    def expect(self, tensor: StoredTensor, rows: range, columns: range | None) -> None:
        """This rectangle will be read after all that came before."""
        self._expected.append((tensor, rows, columns))

    def begin(self) -> None:
        """Reading begins with the first of them. What was expected is forgotten as it is announced."""
        self._pieces, self._expected = _announced(self._expected), []
        self._ahead_bytes = 0
        self.advance(0)

    def advance(self, num_bytes: int) -> None:
        """So many bytes more have been read."""
        self._ahead_bytes -= num_bytes
        while self._ahead_bytes < DISTANCE_BYTES:
            announced = next(self._pieces, 0)
            if not announced:
                return
            self._ahead_bytes += announced


def _announced(expected: list[tuple[StoredTensor, range, range | None]]) -> Iterator[int]:
    """Announces a piece with every step, and says how many bytes of it will be read."""
    for tensor, rows, columns in expected:
        first, num_bytes, stride = tensor.row_bytes(columns)
        step = max(1, _PIECE_BYTES // max(num_bytes, 1))
        for start in range(rows.start, rows.stop, step):
            piece = range(start, min(start + step, rows.stop))
            file, offset = tensor.file.fileno(), tensor.offset + first
            if 2 * num_bytes >= stride:
                _will_need(file, offset + piece.start * stride, len(piece) * stride)
            else:
                for row in piece:
                    _will_need(file, offset + row * stride, num_bytes)
            yield max(len(piece) * num_bytes, 1)


def _will_need(file: int, offset: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_WILLNEED)
