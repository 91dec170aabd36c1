"""Safetensors read by slices, so that a rank touches only its own bytes (C10, C12)."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from models.config import ModelError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as tensors are claimed."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


class WeightReader(Protocol):
    """Where layers take their weights from."""

    @property
    def num_parameters(self) -> int:
        """Elements of the tensors claimed so far, each counted once and whole."""
        ...

    def read(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """Claim the tensor `name` of the whole model's `shape` and return this part of it.

        The result may alias read-only storage: copy what is kept. Raises ModelError when the
        tensor is missing or has another shape or a type that is not floating point.
        """
        ...

    def skip(self, prefix: str) -> None:
        """Claim every tensor whose name starts with `prefix` without reading it."""
        ...


class Checkpoint:
    """The safetensors files of a model folder; a context manager that keeps them mapped while open."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        """Map the files and read their headers. Raises ModelError naming what is wrong."""
        self._progress = progress
        self._files = contextlib.ExitStack()
        self._tensors: dict[str, Any] = {}
        self._unclaimed: dict[str, int] = {}
        self._num_parameters = 0
        self._done_bytes = 0
        try:
            for path, expected in weight_files(folder).items():
                self._open(path, expected)
        except BaseException:
            self._files.close()
            raise
        self._total_bytes = sum(self._unclaimed.values())

    def _open(self, path: Path, expected: frozenset[str]) -> None:
        try:
            file = self._files.enter_context(safe_open(str(path), framework="pt"))
        except FileNotFoundError as error:
            raise ModelError(f"{path.name} is missing in {path.parent}") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} is truncated or not a safetensors file: {error}") from error
        names = set(file.keys())
        if missing := sorted(expected - names):
            raise ModelError(f"{path.name} lacks the tensor {missing[0]} that {INDEX_FILE} places there")
        for name in names:
            if name in self._tensors:
                raise ModelError(f"the tensor {name} is in {path.name} and in another file")
            tensor = file.get_slice(name)
            item_bytes = _ITEM_BYTES.get(tensor.get_dtype())
            if item_bytes is None:
                raise ModelError(f"the tensor {name} has type {tensor.get_dtype()}; expected one of {_types()}")
            self._tensors[name] = tensor
            self._unclaimed[name] = math.prod(tensor.get_shape()) * item_bytes

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

    def read(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"the tensor {name} is missing")
        found = tuple(tensor.get_shape())
        if found != shape:
            raise ModelError(f"the tensor {name} must have shape {list(shape)}; got {list(found)}")
        if name in self._unclaimed:
            self._num_parameters += math.prod(shape)
            self._claim(name)
        own_rows = slice(None) if rows is None else slice(rows.start, rows.stop)
        part: torch.Tensor
        if columns is None:
            part = tensor[own_rows]
        else:
            part = tensor[own_rows, columns.start : columns.stop]
        return part

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


def _types() -> str:
    return ", ".join(_ITEM_BYTES)
