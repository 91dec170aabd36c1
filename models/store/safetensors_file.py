"""Checking safetensors files: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.store.errors import StoreError
from models.store.files import unique

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_TENSORS = 1_000_000
MAX_DIMS = 8

BYTES_PER_ITEM = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def check_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (dtype, shape)} of a safetensors file whose header is sound.

    Raises StoreError for a length, dtype, shape or offset that cannot be true, before any tensor is read.
    """

    def error(text: str) -> StoreError:
        return StoreError(f"{path.name}: {text}")

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise error(f"{size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise error(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if 8 + length > size:
            raise error(f"the header claims {length} bytes, but the file has {size}: it is truncated")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise error(f"the header is not valid JSON: {cause}") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise error(f"the header is not an object of at most {MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, name, error)
        if not end - begin and math.prod(shape) == 0:
            raise error(f"tensor {name!r} of {dtype} {list(shape)} is empty")
        if end - begin != BYTES_PER_ITEM[dtype] * math.prod(shape):
            raise error(f"tensor {name!r} of {dtype} {list(shape)} has {end - begin} bytes of data")
        found[name] = (dtype, shape)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise error(f"tensor {name!r} starts at {begin}, but the one before it ends at {at}")
        at = end
    if 8 + length + at != size:
        raise error(f"the tensors end at byte {8 + length + at}, but the file has {size}")
    return found


def _entry(entry: Any, name: str, error: Callable[[str], StoreError]) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise error(f"tensor {name!r} is described by a {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ITEM:
        raise error(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(dim) for dim in shape):
        raise error(f"tensor {name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(value) for value in offsets):
        raise error(f"tensor {name!r} has impossible offsets")
    begin, end = offsets
    if end < begin:
        raise error(f"tensor {name!r} ends at {end}, before it begins at {begin}")
    return dtype, tuple(shape), begin, end


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
