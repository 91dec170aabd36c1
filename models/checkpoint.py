"""Safetensors read by slices, so that a rank keeps only its own bytes (C10, C12).

The library checks a file's header; the data is read with plain reads and not through its mapping.
A fresh mapping costs a page fault per 4 KiB (measured: 269 MB take 0.6-1.4 s mapped, 0.06 s read),
and a mapped file that somebody truncates kills the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from models.config import ModelError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as tensors are claimed."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_CHUNK_BYTES = 16 << 20


class WeightReader(Protocol):
    """Where layers take their weights from."""

    @property
    def num_parameters(self) -> int:
        """Elements of the tensors claimed so far, each counted once and whole."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name. Asking claims nothing."""
        ...

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        """Claim the tensor `name` of the whole model's `shape` and copy a part of it to `out`.

        `out` is contiguous and has the part's shape; values are converted to its type. Raises
        ModelError when the tensor is missing, has another shape or cannot be read.
        """
        ...

    def skip(self, prefix: str) -> None:
        """Claim every tensor whose name starts with `prefix` without reading it."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies."""

    file: io.FileIO
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, out: torch.Tensor, rows: range, columns: range | None) -> None:
        """Whole rows go straight to their place where nothing is to be converted or left out."""
        if not out.numel():
            return
        out = out.view(len(rows), -1)
        width = math.prod(self.shape[1:])
        row_bytes = width * self.dtype.itemsize
        if columns is None:
            columns = range(width)
        if len(columns) == width and out.dtype == self.dtype and out.device.type == "cpu":
            self._read(out, self.offset + rows.start * row_bytes)
            return
        num_rows = max(1, min(len(rows), _CHUNK_BYTES // max(row_bytes, 1)))
        chunk = torch.empty(num_rows, width, dtype=self.dtype)
        for start in range(0, len(rows), num_rows):
            into = out[start : start + num_rows]
            read = chunk[: len(into)]
            self._read(read, self.offset + (rows.start + start) * row_bytes)
            into.copy_(read[:, columns.start : columns.stop])

    def _read(self, into: torch.Tensor, offset: int) -> None:
        left = into.view(-1).view(torch.uint8).numpy().data
        self.file.seek(offset)
        while left:
            count = self.file.readinto(left)
            if not count:
                raise ModelError(f"{Path(str(self.file.name)).name} ends before its last tensor: it is truncated")
            left = left[count:]


class Checkpoint:
    """The safetensors files of a model folder; a context manager that keeps them open."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        """Open the files and check their headers. Raises ModelError naming what is wrong."""
        self._progress = progress
        self._tensors: dict[str, _Stored] = {}
        self._num_parameters = 0
        self._done_bytes = 0
        with contextlib.ExitStack() as files:
            for path, expected in weight_files(folder).items():
                found = _tensors_of(path, files)
                if missing := sorted(expected - found.keys()):
                    raise ModelError(f"{path.name} lacks the tensor {missing[0]} that {INDEX_FILE} places there")
                if twice := sorted(found.keys() & self._tensors.keys()):
                    raise ModelError(f"the tensor {twice[0]} is in {path.name} and in another file")
                self._tensors.update(found)
            self._files = files.pop_all()
        self._unclaimed = {name: tensor.num_bytes for name, tensor in self._tensors.items()}
        self._total_bytes = sum(self._unclaimed.values())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.clear()
        self._files.close()

    @property
    def num_parameters(self) -> int:
        return self._num_parameters

    def has(self, name: str) -> bool:
        return name in self._tensors

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"the tensor {name} is missing")
        if tensor.shape != shape:
            raise ModelError(f"the tensor {name} must have shape {list(shape)}; got {list(tensor.shape)}")
        tensor.read_into(out, range(shape[0]) if rows is None else rows, columns)
        if name in self._unclaimed:
            self._num_parameters += math.prod(shape)
            self._claim(name)

    def skip(self, prefix: str) -> None:
        for name in [name for name in self._unclaimed if name.startswith(prefix)]:
            self._claim(name)

    def finish(self) -> None:
        """Raises ModelError naming tensors that nobody claimed: the model is not what it says."""
        if self._unclaimed:
            names = sorted(self._unclaimed)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"the tensor {names[0]}{more} belongs to no part of this model")

    def _claim(self, name: str) -> None:
        self._done_bytes += self._unclaimed.pop(name)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """The safetensors files of a folder, each with the tensors that the index places in it.

    Raises ModelError when there is none, naming a pickle if that is all there is: unpickling runs
    code that its author chose.
    """
    index = folder / INDEX_FILE
    if index.exists():
        return _indexed_files(index)
    if (folder / SINGLE_FILE).exists():
        return {folder / SINGLE_FILE: frozenset()}
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES) if folder.is_dir() else []
    if pickles:
        raise ModelError(f"{pickles[0]} is a pickle and is never loaded; the model needs {SINGLE_FILE}")
    raise ModelError(f"neither {SINGLE_FILE} nor {INDEX_FILE} exists in {folder}")


def _indexed_files(index: Path) -> dict[Path, frozenset[str]]:
    size = index.stat().st_size
    if size > _MAX_INDEX_BYTES:
        raise ModelError(f"{index.name}: {size} bytes; the limit is {_MAX_INDEX_BYTES}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"].items()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} holds no weight_map of tensor to file names") from error
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index.name}: {tensor} must be in a .safetensors file of this folder; got {file!r}")
        files.setdefault(file, set()).add(tensor)
    return {index.parent / file: frozenset(names) for file, names in sorted(files.items())}


def _tensors_of(path: Path, files: contextlib.ExitStack) -> dict[str, _Stored]:
    """The tensors of a file that stays open as long as `files`.

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
    found: dict[str, _Stored] = {}
    end = file.seek(0, io.SEEK_END)
    for name, shape, kind in reversed(described):
        dtype = _TYPES.get(kind)
        if dtype is None:
            raise ModelError(f"the tensor {name} has type {kind}; expected one of {', '.join(_TYPES)}")
        end -= math.prod(shape) * dtype.itemsize
        found[name] = _Stored(file, end, shape, dtype)
    return found
