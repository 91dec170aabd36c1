"""A tensor in a safetensors file, read by rectangles.

The library checks a file's header; the data is read with plain reads and not through its mapping. A fresh mapping
costs a page fault per 4 KiB (measured: 269 MB take 0.6-1.4 s mapped, 0.06 s read), and a mapped file that somebody
truncates kills the process.

Measured per call (512 MiB in the page cache, one thread): whole rows 20 GB/s; one read per row 1.3-2 µs, so that
segments of 4 KiB come at 2.3 GB/s and segments of 512 bytes at 0.4. Whole rows with the rest thrown away would be
faster below 4 KiB, but would read what other ranks hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.config import ModelError

_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_OTHER_SIZES = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_WEIGHTS = tuple(kind for kind, dtype in _TYPES.items() if dtype.is_floating_point)
_CHUNK_BYTES = 4 << 20  # that are converted at once: they stay in the cache of the core
_MOST_WASTE = 0.1  # of the bytes read, where whole rows are read for the sake of most of their columns


class Scratch:
    """Memory for values on their way, kept because fresh pages cost as much as the copy into them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised; valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(shape)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: io.FileIO
    offset: int
    shape: tuple[int, ...]
    kind: str  # as safetensors spells types

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * item_size(self.kind)

    def read_into(self, out: torch.Tensor, rows: range, columns: range | None, scratch: Scratch) -> int:
        """Copy the rectangle to `out`, converted to its type. Returns the bytes read from the file.

        On the meta device nothing is read, but counted as if it were. Raises ModelError, beginning with a verb whose
        subject is this tensor, when the file ends early, for integers where floating-point values are wanted, or for
        values that float16 would make infinite.
        """
        dtype = _TYPES.get(self.kind)
        if dtype is None or (dtype != out.dtype and not dtype.is_floating_point):
            raise ModelError(f"has type {self.kind}; expected one of {', '.join(_WEIGHTS)}")
        if not out.numel():
            return 0
        out = out.view(len(rows), -1)
        width = math.prod(self.shape[1:])
        columns = range(width) if columns is None else columns
        if len(columns) > (1 - _MOST_WASTE) * width:
            read = range(width)
            place = columns
        else:
            read = columns
            place = range(len(columns))
        if out.device.type == "meta":
            return len(rows) * len(read) * dtype.itemsize
        if len(read) == len(columns) and out.dtype == dtype and out.device.type == "cpu":
            return self._read(out, rows.start, read, width)
        step = max(1, _CHUNK_BYTES // (len(read) * dtype.itemsize))
        num_bytes = 0
        for start in range(0, len(rows), step):
            into = out[start : start + step]
            chunk = scratch.empty((len(into), len(read)), dtype)
            num_bytes += self._read(chunk, rows.start + start, read, width)
            into.copy_(chunk[:, place.start : place.stop])
            if out.dtype == torch.float16 and dtype != out.dtype and into.isinf().any():
                raise ModelError("has values beyond float16's 65,504; bfloat16 and float32 hold them")
        return num_bytes

    def row_bytes(self, columns: range | None) -> tuple[int, int, int]:
        """Of the columns within a row: where they begin, how many bytes they are; and from one row to the next."""
        item, width = item_size(self.kind), math.prod(self.shape[1:])
        columns = range(width) if columns is None else columns
        return columns.start * item, len(columns) * item, width * item

    def _read(self, into: torch.Tensor, first_row: int, columns: range, width: int) -> int:
        """Fill `into` [n, len(columns)] of the stored type: in one read where rows are whole, else one per row."""
        left = into.view(-1).view(torch.uint8).numpy().data
        item = into.element_size()
        at = self.offset + (first_row * width + columns.start) * item
        if len(columns) == width:
            self._fill(left, at)
            return len(left)
        file, segment, stride = self.file.fileno(), len(columns) * item, width * item
        for start in range(0, len(left), segment):
            part = left[start : start + segment]
            if os.preadv(file, [part], at) != segment:
                self._fill(part, at)
            at += stride
        return len(left)

    def _fill(self, left: memoryview, offset: int) -> None:
        while left:
            try:
                count = os.preadv(self.file.fileno(), [left], offset)
            except OSError as error:
                raise ModelError(f"cannot be read from {self._file_name}: {error.strerror}") from error
            if not count:
                raise ModelError(f"is cut off: {self._file_name} ends before it does, and is truncated")
            left, offset = left[count:], offset + count

    @property
    def _file_name(self) -> str:
        return Path(str(self.file.name)).name


def item_size(kind: str) -> int:
    """Bytes of one value."""
    dtype = _TYPES.get(kind)
    return _OTHER_SIZES[kind] if dtype is None else dtype.itemsize


def stored_tensors(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """The tensors of a file that stays open as long as `files`. Raises ModelError.

    safe_open refuses a header whose tensors leave gaps, overlap or do not end where the file ends,
    so offsets follow from the order and the sizes.
    """
    try:
        file = files.enter_context(io.FileIO(path))
        with safe_open(str(path), framework="pt") as header:
            slices = [(name, header.get_slice(name)) for name in header.offset_keys()]
            described = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
    except FileNotFoundError as error:
        raise ModelError(f"{path.name} is missing in {path.parent}") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is truncated or not a safetensors file: {error}") from error
    if hasattr(os, "posix_fadvise"):
        # Twice as much is read ahead: 2.3 GB/s from this disk instead of 1.3, and no more with several readers.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    found: dict[str, StoredTensor] = {}
    end = file.seek(0, io.SEEK_END)
    for name, shape, kind in reversed(described):
        if kind not in _TYPES and kind not in _OTHER_SIZES:
            raise ModelError(f"the tensor {name} has type {kind}; expected one of {', '.join(_WEIGHTS)}")
        end -= math.prod(shape) * item_size(kind)
        found[name] = StoredTensor(file, end, shape, kind)
    return found
