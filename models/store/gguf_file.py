"""A bounded reader of GGUF files (versions 2 and 3, little-endian).

Layout, from the specification in ggml's `docs/gguf.md`: magic, u32 version, u64 number of tensors, u64 number
of metadata pairs, the pairs, the tensor descriptions, padding to `general.alignment`, the tensors. Every count
and length comes from the file, so each is checked against a limit and against the bytes that are left before
anything is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.store.errors import StoreError
from models.store.gguf_parts import MAX_PARTS, part_paths

MAX_PAIRS = 4096
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 1024
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_ITEMS = 4 << 20
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16

FORMATS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip
"""Tensor formats that we dequantise: (ggml's number, values per block, bytes per block).

Written down here so that reading a header needs no `gguf`, whose import takes longer than the reading.
"""

_NAMES = {number: name for name, (number, _, _) in FORMATS.items()}

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING = 8
_ARRAY = 9

Bytes = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.int64]
"""Which rows, in which order."""


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor, still quantised. shape: row-major (outermost first), as torch has it."""

    name: str
    shape: tuple[int, ...]
    format: str
    data: Bytes  # a view of the mapped file

    @property
    def height(self) -> int:
        """Rows when all dimensions but the last are one."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.shape[-1]

    def blocks(self, rows: Rows) -> Bytes:
        """The quantised blocks of some rows: [len(rows), blocks per row, bytes per block]."""
        _, per_block, block_bytes = FORMATS[self.format]
        return self.data.reshape(self.height, self.width // per_block, block_bytes)[rows]

    def rows(self, rows: Rows) -> Float:
        """Some rows' values, float32 [len(rows), width]."""
        return _to_float32(self.blocks(rows), self.format)

    def columns(self, first: int, last: int) -> Float:
        """The values of columns `first` to `last`, which are block boundaries: float32 [height, last - first]."""
        per_block = FORMATS[self.format][1]
        return _to_float32(self.blocks(slice(None))[:, first // per_block : last // per_block], self.format)

    def to_float32(self) -> Float:
        """All values, float32 of `shape`. For small tensors."""
        return self.rows(slice(None)).reshape(self.shape)


def _to_float32(blocks: Bytes, format: str) -> Float:
    """[rows, blocks, bytes] -> float32 [rows, values]."""
    data = np.ascontiguousarray(blocks).reshape(len(blocks), -1)
    match format:
        case "F32":
            return data.view("<f4")
        case "F16":
            return data.view("<f2").astype(np.float32)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # whoever uses the values checks that they are finite
        return np.asarray(dequantize(data, GGMLQuantizationType[format]), dtype=np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensors of one file. The tensors stay in the page cache until they are read."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata value of the given type, `default` when absent.

        Raises StoreError when the value has another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise StoreError(f"{self.path.name}: metadata {key!r} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def require(self, key: str, kind: type) -> Any:
        """As `get`, but raises StoreError when the key is absent."""
        value = self.get(key, kind)
        if value is None:
            raise StoreError(f"{self.path.name}: metadata {key!r} is missing, so the file cannot be converted")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file and map its tensors; of a model in several files, give the first.

    Raises StoreError for anything that is not a well-formed file of known tensor formats.
    """
    first = _read_one(path)
    count = first.get("split.count", int, 1)
    if count == 1:
        return first
    if not 1 < count <= MAX_PARTS or first.get("split.no", int, 0) != 0:
        raise StoreError(
            f"{path.name}: part {first.get('split.no', int, 0) + 1} of {count}; give the first of the parts"
        )
    tensors = dict(first.tensors)
    for number, sibling in enumerate(part_paths(path)[1:], 1):
        part = _read_one(sibling)
        if (part.get("split.no", int, -1), part.get("split.count", int, -1)) != (number, count):
            raise StoreError(f"{sibling.name}: not part {number + 1} of {count} of {path.name}")
        if twice := tensors.keys() & part.tensors.keys():
            raise StoreError(f"{sibling.name}: tensor {min(twice)!r} is in an earlier part, too")
        tensors |= part.tensors
    wanted = first.get("split.tensors.count", int, len(tensors))
    if len(tensors) != wanted:
        raise StoreError(f"{path.name}: {len(tensors)} tensors in all parts, not {wanted}; give the first of all parts")
    return GgufFile(path, first.metadata, tensors)


def _read_one(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise StoreError(f"{path.name}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise StoreError(f"{path.name}: not a GGUF file (it starts with {magic!r})")
    return _Parser(path).parse()


class _Parser:
    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._data: Bytes = np.frombuffer(self._view, dtype=np.uint8)
        self._at = 4

    def parse(self) -> GgufFile:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise self._error(f"GGUF version {version} is not supported (2 and 3 are)")
        num_tensors = self._count("tensors", MAX_TENSORS)
        num_pairs = self._count("metadata pairs", MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string(MAX_KEY_BYTES)
            if key in metadata:
                raise self._error(f"metadata {key!r} appears twice")
            metadata[key] = self._value(self._scalar("<I"), key)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
            raise self._error(f"general.alignment is {alignment!r}; a multiple of 8 up to {MAX_ALIGNMENT} is wanted")
        described = [self._describe() for _ in range(num_tensors)]
        start = -(-self._at // alignment) * alignment
        return GgufFile(self._path, metadata, self._tensors(described, start, alignment))

    def _tensors(
        self, described: list[tuple[str, tuple[int, ...], str, int, int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        end = 0
        for name, shape, kind, offset, size in sorted(described, key=lambda entry: entry[3]):
            if name in tensors:
                raise self._error(f"tensor {name!r} appears twice")
            if offset % alignment:
                raise self._error(f"tensor {name!r} starts at {offset}, not a multiple of {alignment}")
            if offset < end:
                raise self._error(f"tensor {name!r} overlaps the one before it")
            end = offset + size
            if start + end > len(self._data):
                raise self._error(
                    f"tensor {name!r} ends at byte {start + end}, but the file has {len(self._data)}: "
                    "it is truncated, fetch it again"
                )
            tensors[name] = GgufTensor(name, shape, kind, self._data[start + offset : start + end])
        return tensors

    def _describe(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """(name, shape, format, offset, bytes) of one tensor."""
        name = self._string(MAX_KEY_BYTES)
        num_dims = self._scalar("<I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._error(f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
        dims = tuple(self._scalar("<Q") for _ in range(num_dims))
        code = self._scalar("<I")
        offset = self._scalar("<Q")
        format = _NAMES.get(code)
        if format is None:
            raise self._error(
                f"tensor {name!r} is quantised as {_foreign_name(code)}, which is not supported; use a file in one of "
                f"{', '.join(FORMATS)}"
            )
        _, per_block, block_bytes = FORMATS[format]
        if not all(dims) or dims[0] % per_block:
            raise self._error(f"tensor {name!r} has dimensions {list(dims)}: not whole blocks of {per_block}")
        return name, dims[::-1], format, offset, math.prod(dims) // per_block * block_bytes

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(self._scalar("<I"), key)
        if kind not in _SCALARS:
            raise self._error(f"metadata {key!r} has the unknown type number {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, key: str) -> list[Any]:
        count = self._scalar("<Q")
        if count > MAX_ARRAY_ITEMS:
            raise self._error(f"metadata {key!r} has {count} items; at most {MAX_ARRAY_ITEMS} are allowed")
        if kind == _STRING:
            if count * 8 > len(self._view) - self._at:
                raise self._error(f"metadata {key!r} is truncated")
            return [self._string(MAX_STRING_BYTES) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._error(f"metadata {key!r} is an array of the unsupported type number {kind}")
        code = _SCALARS[kind]
        size = struct.calcsize(code) * count
        chunk = self._take(size)
        return list(struct.unpack(f"<{count}{code[1]}", chunk))

    def _string(self, limit: int) -> str:
        length = self._scalar("<Q")
        if length > limit:
            raise self._error(f"a string of {length} bytes at byte {self._at}; at most {limit} are allowed")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise self._error(f"a string before byte {self._at} is not UTF-8") from None

    def _count(self, what: str, limit: int) -> int:
        count = self._scalar("<Q")
        if count > limit:
            raise self._error(f"{count} {what}; at most {limit} are allowed")
        return int(count)

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._view):
            raise self._error(f"the header ends beyond the file's {len(self._view)} bytes: it is truncated")
        chunk = self._view[self._at : end]
        self._at = end
        return chunk

    def _error(self, text: str) -> StoreError:
        return StoreError(f"{self._path.name}: {text}")


def _foreign_name(code: int) -> str:
    """ggml's name of a format that is not ours."""
    from gguf.constants import GGMLQuantizationType

    try:
        name: str = GGMLQuantizationType(code).name
    except ValueError:
        return f"format number {code}"
    return name
