"""The weights of a model folder, read by slices, so that a rank reads only its own bytes (C10, C12)."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from models.config import ModelError
from models.read_ahead import ReadAhead
from models.stored_tensor import Scratch, StoredTensor, stored_tensors
from models.weight_files import INDEX_FILE, weight_files


class Checkpoint:
    """The safetensors files of a model folder; a context manager that keeps them open.

    A WeightReader for one thread: several would share its scratch memory and its counts.
    """

    def __init__(self, folder: Path, on_read: Callable[[int], None] | None = None) -> None:
        """Open the files and check their headers. Raises ModelError naming what is wrong.

        on_read: told bytes_read as it rises.
        """
        self._tensors: dict[str, StoredTensor] = {}
        self._scratch = Scratch()
        self._ahead = ReadAhead()
        self._on_read = on_read
        self._num_parameters = 0
        self.bytes_read = 0  # of tensor data asked from the files, headers not counted
        with contextlib.ExitStack() as files:
            for path, expected in weight_files(folder).items():
                found = stored_tensors(path, files)
                if missing := sorted(expected - found.keys()):
                    raise ModelError(f"{path.name} lacks the tensor {missing[0]} that {INDEX_FILE} places there")
                if twice := sorted(found.keys() & self._tensors.keys()):
                    raise ModelError(f"the tensor {twice[0]} is in {path.name} and in another file")
                self._tensors.update(found)
            self._files = files.pop_all()
        self._names = sorted(self._tensors)
        self._unclaimed = set(self._names)

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

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the folder."""
        return sum(tensor.num_bytes for tensor in self._tensors.values())

    def has(self, name: str) -> bool:
        return name in self._tensors

    def claim(self, name: str, shape: tuple[int, ...]) -> None:
        self._claimed(name, shape)

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        tensor = self._claimed(name, shape)
        rows = range(shape[0]) if rows is None else rows
        try:
            num_bytes = tensor.read_into(out, rows, columns, self._scratch)
        except ModelError as error:
            raise ModelError(f"the tensor {name} {error}") from error
        self.bytes_read += num_bytes
        if out.device.type == "meta":
            self._ahead.expect(tensor, rows, columns)
            return
        self._ahead.advance(num_bytes)
        if self._on_read is not None:
            self._on_read(self.bytes_read)

    def skip(self, prefix: str) -> None:
        for at in range(bisect.bisect_left(self._names, prefix), len(self._names)):
            if not self._names[at].startswith(prefix):
                break
            self._unclaimed.discard(self._names[at])

    def rewind(self) -> None:
        """As if nothing had been claimed, skipped or read. What was read on the meta device is expected to follow."""
        self._unclaimed.update(self._names)
        self._num_parameters = self.bytes_read = 0
        self._ahead.begin()

    def finish(self) -> None:
        """Raises ModelError naming tensors that nobody claimed: the model is not what it says."""
        if self._unclaimed:
            names = sorted(self._unclaimed)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"the tensor {names[0]}{more} belongs to no part of this model")

    def _claimed(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"the tensor {name} is missing")
        if tensor.shape != shape:
            raise ModelError(f"the tensor {name} must have shape {list(shape)}; got {list(tensor.shape)}")
        if name in self._unclaimed:
            self._unclaimed.remove(name)
            self._num_parameters += _num_values(name, shape)
        return tensor


def _num_values(name: str, shape: tuple[int, ...]) -> int:
    """Parameters that a stored tensor stands for: 4-bit codes are two to a byte, and their scales are none."""
    kind = name.rpartition(".")[2]
    return {"codes": 2, "scales": 0, "offsets": 0}.get(kind, 1) * math.prod(shape)
