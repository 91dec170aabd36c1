"""Weights made up for a shape: what a model costs and how fast it runs can be known without its checkpoint."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from models.config import ModelError

STD = 0.02
_PERIOD = 1 << 20  # values that a generator made; everything else is taken from them
_CHUNK_VALUES = 1 << 20


class RandomWeights:
    """A WeightReader that has every tensor it is asked for.

    Values are normal with mean 0 and deviation STD, but 1-D tensors that are no bias (norms) have mean 1. A value
    depends on the seed, the tensor's name, its row and its column alone, so the slices of any number of ranks are
    slices of the same tensor. Row r is a window of one table of 2²⁰ normal values at a place hashed from (seed, name,
    r): as fast as copying (measured: 1 to 2 billion bf16 values a second), and random enough for anything but
    statistics over more values than the table has.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tables: dict[torch.dtype, torch.Tensor] = {}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    def has(self, name: str) -> bool:
        """False: nothing is there before its shape is claimed, so no layer takes an optional tensor."""
        return False

    def claim(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.setdefault(name, shape) != shape:
            raise ModelError(f"the tensor {name} has shape {list(self._shapes[name])}; claimed again as {list(shape)}")

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        self.claim(name, shape)
        if out.device.type == "meta" or not out.numel():
            return
        is_vector = len(shape) == 1
        if is_vector:
            columns, rows = (range(shape[0]) if rows is None else rows), range(1)
        width = shape[0] if is_vector else math.prod(shape[1:])
        rows = range(shape[0]) if rows is None else rows
        columns = range(width) if columns is None else columns
        key = hashlib.blake2b(f"{self._seed}\0{name}".encode(), digest_size=8).digest()
        starts = _mixed(np.arange(rows.start, rows.stop, dtype=np.uint64) ^ np.uint64(int.from_bytes(key, "little")))
        into = out.view(len(rows), len(columns))
        for first in range(0, len(columns), _PERIOD):  # the table ends in a copy of its beginning, no wider
            columns_here = columns[first : first + _PERIOD]
            places = ((starts + np.uint64(columns_here.start)) % np.uint64(_PERIOD)).astype(np.int64)
            self._windows_into(into[:, first : first + len(columns_here)], places)
        if is_vector and not name.endswith("bias"):
            out.add_(1.0)

    def skip(self, prefix: str) -> None:
        """Nothing that was not claimed exists."""

    def _windows_into(self, into: torch.Tensor, places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Row i of `into` becomes the table from places[i] on."""
        width = into.shape[1]
        table = self._table(into.dtype)
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[table.element_size()]
        windows = sliding_window_view(table.view(torch.uint8).numpy().view(bits), width)
        step = max(1, _CHUNK_VALUES // width)
        for first in range(0, len(places), step):
            chunk = torch.from_numpy(windows[places[first : first + step]]).view(table.dtype)
            into[first : first + step].copy_(chunk)

    def _table(self, dtype: torch.dtype) -> torch.Tensor:
        """[2 * _PERIOD]: the period twice, so that every window is in one piece."""
        if dtype not in self._tables:
            generator = np.random.Generator(np.random.Philox(self._seed))
            period = torch.from_numpy(generator.standard_normal(_PERIOD, np.float32) * np.float32(STD))
            self._tables[dtype] = period.repeat(2).to(dtype)
        return self._tables[dtype]


def _mixed(counter: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): neighbouring counters become unrelated numbers."""
    x = counter * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
