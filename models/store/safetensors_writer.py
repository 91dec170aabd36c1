"""Writing safetensors: one file, or shards with an index, a few pieces of a tensor in memory at a time.

Layout: u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data. Written here rather than by the
library so that values are converted by a few threads, in order, while others are hashed and written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from models.store.errors import StoreError
from models.store.files import write_synced
from models.store.folder import INDEX, WEIGHTS
from models.store.safetensors_file import BYTES_PER_ITEM

MAX_THREADS = 8  # beyond it, hashing is slower than converting


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor. pieces: each makes a part of its values, all of them in C order, of the dtype's width."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    pieces: Sequence[Callable[[], np.ndarray[Any, Any]]]

    @property
    def num_bytes(self) -> int:
        return BYTES_PER_ITEM[self.dtype] * math.prod(self.shape)


def write_weights(
    folder: Path,
    entries: Sequence[Entry],
    progress: Callable[[int, int], None],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` (one tensor may be larger) and their index.

    Returns {file name: sha256 in hex}. The files are synced. progress: called with (bytes written, bytes in all) after
    each piece. Raises StoreError when a tensor's values are not as many as its shape says, or a name comes twice.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise StoreError(f"the tensor {next(name for name in names if names.count(name) > 1)!r} comes twice")
    total = sum(entry.num_bytes for entry in entries)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    shards = list(_shards(entries, max_shard_bytes))
    if len(shards) == 1:
        return {WEIGHTS: _write_file(folder / WEIGHTS, shards[0], advance)}
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes[name] = _write_file(folder / name, shard, advance)
        weight_map |= dict.fromkeys((entry.name for entry in shard), name)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    write_synced(folder / INDEX, index.encode())
    return hashes


def _shards(entries: Sequence[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    yield shard


def _write_file(path: Path, entries: Sequence[Entry], advance: Callable[[int], None]) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.num_bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = hashlib.sha256()
    made = _in_order([piece for entry in entries for piece in entry.pieces])
    with path.open("xb") as file, contextlib.closing(made):
        for chunk in (struct.pack("<Q", len(text)), text):
            state.update(chunk)
            file.write(chunk)
        for entry in entries:
            left = entry.num_bytes
            for _ in entry.pieces:
                data = np.ascontiguousarray(next(made)).data
                left -= data.nbytes
                state.update(data)
                file.write(data)
                advance(data.nbytes)
            if left:
                raise StoreError(
                    f"tensor {entry.name!r} of {entry.dtype} {list(entry.shape)}: {left} bytes are missing"
                )
        file.flush()
        os.fsync(file.fileno())
    return state.hexdigest()


def _in_order(pieces: Sequence[Callable[[], np.ndarray[Any, Any]]]) -> Generator[np.ndarray[Any, Any], None, None]:
    """What the pieces make, a few of them ahead of whoever takes them."""
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    waiting: collections.deque[Future[np.ndarray[Any, Any]]] = collections.deque()
    with ThreadPoolExecutor(num_threads, "convert") as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(piece))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
