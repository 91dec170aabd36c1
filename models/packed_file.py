"""Packed weights in a folder: one file of data, read straight into the memory in which it is multiplied, and an index.

The index carries a digest of itself and of every tensor. A tensor's is taken over sums of 2 KiB rows: a changed,
missing, zeroed or misplaced piece shows unless it keeps the sum of its row, at 18 GB/s per thread where a
cryptographic hash makes 1 (measured). It guards against broken disks and half-written files; against other users, the
folder's mode does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.ops.kernels import Kernels, PackedLinear

DATA_FILE, INDEX_FILE = "weights.bin", "index.json"
_MAX_INDEX_BYTES = 256 << 20
_CHUNK_BYTES = 4 << 20  # read and summed while it is in the core's cache; a multiple of _ROW_BYTES
_ROW_BYTES = 2048
_ALIGNMENT = 4096


class DamagedFile(Exception):
    """A folder that is not what was written; the text says in which way."""


class PackedFile:
    """A folder that `write_packed` made, open for reading."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Raises FileNotFoundError when there is none, OSError, or DamagedFile, also where the identity is another."""
        self._entries = _read_index(folder / INDEX_FILE, identity)
        self._file = (folder / DATA_FILE).open("rb", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        wanted = max((piece["offset"] + piece["bytes"] for piece in self._pieces()), default=0)
        if size < wanted:
            self._file.close()
            raise DamagedFile(f"{DATA_FILE} has {size} bytes of {wanted}")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def close(self) -> None:
        self._file.close()

    def has(self, key: str) -> bool:
        return key in self._entries

    def load(self, key: str, kernels: Kernels) -> tuple[PackedLinear, int]:
        """The weight `key`, and the bytes read for it. On the meta device nothing is read, but counted.

        Raises KeyError when it is not in the folder, DamagedFile when its bytes are not what was written, or not
        what these kernels pack, and OSError.
        """
        entry = self._entries[key]
        try:
            dtype = getattr(torch, entry["dtype"])
            pieces: dict[str, dict[str, Any]] = entry["pieces"]
            out_features, in_features = entry["shape"]
            packed = kernels.empty_packed(out_features, in_features, dtype, entry["format"], entry["has_offsets"])
            if packed.data.device.type != "meta":
                tensors = packed_tensors(packed)
                if tensors.keys() != pieces.keys():
                    raise DamagedFile(f"{key} has other parts than these kernels pack")
                for name, tensor in tensors.items():
                    self._read(tensor, pieces[name], key)
            return packed, sum(piece["bytes"] for piece in pieces.values())
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise DamagedFile(f"{key} is not described as these kernels pack it: {error!r}") from error

    def _read(self, tensor: torch.Tensor, piece: dict[str, Any], key: str) -> None:
        if list(tensor.shape) != piece["shape"] or _name(tensor.dtype) != piece["dtype"]:
            raise DamagedFile(f"{key} has another layout than these kernels pack")
        offset, checksum = piece["offset"], Checksum()
        for chunk in _chunks(tensor):
            left = chunk
            while left:
                count = os.preadv(self._file.fileno(), [left], offset)
                if not count:
                    raise DamagedFile(f"{DATA_FILE} ends within {key}")
                left, offset = left[count:], offset + count
            checksum.update(chunk)
        if checksum.hexdigest() != piece["sum"]:
            raise DamagedFile(f"the bytes of {key} have changed")

    def _pieces(self) -> Iterator[dict[str, Any]]:
        for entry in self._entries.values():
            yield from entry["pieces"].values()


def write_packed(folder: Path, identity: str, weights: Mapping[str, PackedLinear]) -> None:
    """Fill an existing, empty folder and have the disk keep it. Raises OSError.

    identity: of what the weights belong to: a folder that was moved to another's place is not taken for it.
    """
    entries: dict[str, dict[str, Any]] = {}
    offset = 0
    with (folder / DATA_FILE).open("xb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o600)
        for key, packed in weights.items():
            pieces = {}
            for name, tensor in packed_tensors(packed).items():
                offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
                file.seek(offset)
                checksum = Checksum()
                for chunk in _chunks(tensor):
                    checksum.update(chunk)
                    left = chunk
                    while left:
                        left = left[file.write(left) :]
                pieces[name] = {
                    "offset": offset,
                    "bytes": tensor.nbytes,
                    "shape": list(tensor.shape),
                    "dtype": _name(tensor.dtype),
                    "sum": checksum.hexdigest(),
                }
                offset += tensor.nbytes
            entries[key] = {
                "shape": [packed.out_features, packed.in_features],
                "dtype": _name(packed.dtype),
                "format": packed.format,
                "has_offsets": packed.has_offsets,
                "pieces": pieces,
            }
        os.fsync(file.fileno())
    body = json.dumps(entries, separators=(",", ":")).encode()
    with (folder / INDEX_FILE).open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(_digest(identity, body).encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())


def packed_bytes(weights: Mapping[str, PackedLinear]) -> int:
    """That the data file of these weights takes."""
    tensors = [tensor for packed in weights.values() for tensor in packed_tensors(packed).values()]
    return sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)


def packed_tensors(packed: PackedLinear) -> dict[str, torch.Tensor]:
    """The tensors of a packed weight by the names of its fields."""
    values = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


class Checksum:
    """Of bytes given in pieces, all of which but the last are multiples of 2 KiB."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def update(self, piece: memoryview) -> None:
        whole = len(piece) // _ROW_BYTES * _ROW_BYTES
        words = np.frombuffer(piece[:whole], np.uint64).reshape(-1, _ROW_BYTES // 8)
        self._hash.update(words.sum(axis=1, dtype=np.uint64).data)
        self._hash.update(piece[whole:])

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES]


def _read_index(path: Path, identity: str) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        content = file.read(_MAX_INDEX_BYTES + 1)
    digest, _, body = content.partition(b"\n")
    if len(content) > _MAX_INDEX_BYTES or digest.decode(errors="replace") != _digest(identity, body):
        raise DamagedFile(f"{INDEX_FILE} is not what was written")
    entries = json.loads(body)
    assert isinstance(entries, dict)  # its digest is right
    return entries


def _digest(identity: str, body: bytes) -> str:
    return hashlib.blake2b(identity.encode() + b"\n" + body, digest_size=16).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
