"""Weights repacked strip by strip, in a thread of their own, while the next are read.

Reading waits for the disk, packing for the processor, and neither holds the interpreter lock. A weight is never whole
in memory but in its packed form: what lies between is a few strips (measured: 16 MiB strips of bf16 pack at 2 GB/s
per thread and are read at 2.3 GB/s from the disk, 20 GB/s from the page cache).
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch

from models.ops.kernels import Kernels, PackedLinear
from models.quant.method import WeightPart, read_part
from models.weight_reader import WeightReader

STRIP_BYTES = 16 << 20
_NUM_STRIPS = 3  # one being read, one being packed, one that waits between them


@dataclasses.dataclass(frozen=True, slots=True)
class _Strip:
    pack: Callable[[], None]
    memory: torch.Tensor  # to be given back


class Packer:
    """A context manager. What was given to `pack` is packed when the block has ended."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        """dtype: of the values given to the kernels; tensors stored in another are converted."""
        self._kernels = kernels
        self._dtype = dtype
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[_Strip | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        for _ in range(_NUM_STRIPS):
            self._free.put(torch.empty(0, dtype=dtype))
        self._is_inference = torch.is_inference_mode_enabled()  # a property of threads
        self._thread = threading.Thread(target=self._work, name="pack weights", daemon=True)

    def __enter__(self) -> Packer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._failure = self._failure or error  # what waits need not be packed any more
        self._waiting.put(None)
        self._thread.join()
        if error is None and self._failure is not None:
            raise self._failure

    def pack(self, reader: WeightReader, parts: Sequence[WeightPart], packed: PackedLinear) -> None:
        """Read `parts` of equal width, stacked along the outputs, into `packed`, whose rows they fill.

        Raises ModelError as `WeightReader.read_into`, or what an earlier strip failed with.
        """
        if packed.data.device.type == "meta":
            for part in parts:
                read_part(reader, part, torch.empty(part.part_shape, dtype=self._dtype, device="meta"))
            return
        for part in parts:  # also those of which this rank has nothing
            reader.claim(part.stored_name, part.stored_shape)
        width = packed.in_features
        for rows in self.strips(packed, width * self._dtype.itemsize):
            memory = self._take()
            if len(memory) < len(rows) * width:
                memory = torch.empty(len(rows) * width, dtype=self._dtype)
            strip = memory[: len(rows) * width].view(len(rows), width)
            for part, into in pieces(parts, rows):
                read_part(reader, part, strip[into.start : into.stop])
            self._waiting.put(_Strip(functools.partial(self._kernels.pack_rows, packed, rows.start, strip), memory))

    def strips(self, packed: PackedLinear, row_bytes: int) -> Iterator[range]:
        """The rows of `packed` in strips of about STRIP_BYTES, with so many bytes of what is read per row."""
        height = self._kernels.pack_height
        num_rows = max(1, STRIP_BYTES // max(row_bytes * height, 1)) * height
        for first_row in range(0, packed.out_features, num_rows):
            yield range(first_row, min(first_row + num_rows, packed.out_features))

    def hand_over(self, pack: Callable[[], None]) -> None:
        """Have `pack` called in the packing thread, after what was handed over before; waits while enough waits there.

        Raises what an earlier call failed with.
        """
        self._waiting.put(_Strip(pack, self._take()))

    def _take(self) -> torch.Tensor:
        memory = self._free.get()
        if self._failure is not None:
            raise self._failure
        return memory

    def _work(self) -> None:
        with torch.inference_mode(self._is_inference):
            while (strip := self._waiting.get()) is not None:
                if self._failure is None:
                    try:
                        strip.pack()
                    except BaseException as error:
                        self._failure = error
                self._free.put(strip.memory)


def pieces(parts: Sequence[WeightPart], rows: range) -> Iterator[tuple[WeightPart, range]]:
    """What lies in `rows` of the stacked parts: pieces of parts, and the rows of the strip that each fills."""
    first = 0
    for part in parts:
        own = range(part.shape[0]) if part.rows is None else part.rows
        start, stop = max(rows.start, first), min(rows.stop, first + len(own))
        if start < stop:
            piece = range(own.start + start - first, own.start + stop - first)
            yield dataclasses.replace(part, rows=piece), range(start - rows.start, stop - rows.start)
        first += len(own)
