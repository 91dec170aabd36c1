"""Ranks of one host: tensors through a segment of memory that all of them have mapped.

The segment is a memfd: it has no name in /dev/shm or elsewhere, and the kernel frees it with the last
process that maps it, however that process ends. Rank 0 makes it; the others, of the same user, open it
through /proc, check whose it is and that it was made for this very gang.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib
import mmap
import os
import stat
from typing import Any, Final

import torch

from models.parallel import TransportError, sum_in_order

native: Any
try:
    native = importlib.import_module("models.transports._shared_memory")
except ImportError:  # installed without a compiler
    native = None

MAX_PIECE_BYTES: Final = 256 << 10  # of a reduction: what a core's own cache holds of two ranks' parts
MAX_SLOT_BYTES: Final = 256 << 20
_PAGE: Final = 4096
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


def is_available() -> bool:
    """Whether this installation and system can share memory among ranks."""
    return native is not None and hasattr(os, "memfd_create")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where a gang's groups and links lie in the segment. Sizes and offsets in bytes.

    slot_bytes: the largest tensor that a step usually moves; a link's ring holds one per stage and one more.
    """

    name: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    slot_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.slot_bytes <= MAX_SLOT_BYTES:
            raise ValueError(f"slot_bytes must be from 1 to {MAX_SLOT_BYTES}; got {self.slot_bytes}")

    @property
    def piece_bytes(self) -> int:
        return min(_rounded(self.slot_bytes, 64), MAX_PIECE_BYTES)

    @property
    def ring_bytes(self) -> int:
        return (self.pipeline_parallel_size + 1) * (_rounded(self.slot_bytes, 64) + 64)

    @property
    def _group_bytes(self) -> int:
        return _rounded(self.tensor_parallel_size * (native.LINE_BYTES + 2 * self.piece_bytes), _PAGE)

    @property
    def _link_bytes(self) -> int:
        return _rounded(2 * native.LINE_BYTES + self.ring_bytes, _PAGE)

    def group(self, stage: int) -> int:
        return _PAGE + stage * self._group_bytes

    def link(self, stage: int, tensor_rank: int) -> int:
        """From `stage` to the next one."""
        index = stage * self.tensor_parallel_size + tensor_rank
        return self.group(self.pipeline_parallel_size) + index * self._link_bytes

    @property
    def total(self) -> int:
        return self.link(self.pipeline_parallel_size - 1, 0)

    @property
    def mark(self) -> bytes:
        """What the segment begins with: whoever maps another gang's, or divides it otherwise, learns it."""
        fields = (self.name, self.tensor_parallel_size, self.pipeline_parallel_size, self.slot_bytes)
        return hashlib.blake2b(repr(fields).encode(), digest_size=32).digest()


class Segment:
    """The mapped memory. Lives for as long as a transport or link refers to it."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()

    @property
    def mark(self) -> bytes:
        return self._map[:32]

    @mark.setter
    def mark(self, mark: bytes) -> None:
        self._map[:32] = mark


class SegmentOffer:
    """Rank 0's side: the open segment, until everybody has mapped it."""

    def __init__(self, layout: Layout) -> None:
        self._fd = os.memfd_create("argosy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, layout.total)
        # A peer must not be able to cut off memory that others read: that would be a SIGBUS.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.segment = Segment(self._fd, layout.total)
        self.segment.mark = layout.mark

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        os.close(self._fd)


def open_segment(path: str, layout: Layout) -> Segment:
    """The segment that rank 0 offers at `path`. Raises TransportError: it cannot be opened, or is not this gang's."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransportError(f"the shared memory of rank 0 cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        is_ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o600
        if not is_ours or not stat.S_ISREG(found.st_mode) or found.st_size != layout.total:
            raise TransportError(
                f"the shared memory of rank 0 is not as agreed: owner {found.st_uid}, mode {found.st_mode:o}, "
                f"{found.st_size} bytes; expected {os.geteuid()}, {stat.S_IFREG | 0o600:o}, {layout.total} bytes"
            )
        segment = Segment(fd, layout.total)
    finally:
        os.close(fd)
    if segment.mark != layout.mark:
        raise TransportError("the shared memory of rank 0 was made for another gang")
    return segment


class _End:
    """One rank's end of a group or a link. One thread uses it; any thread may close it."""

    def __init__(self, segment: Segment, end: Any, what: str) -> None:
        self._segment = segment  # keeps the memory mapped
        self._end = end
        self._what = what

    def close(self) -> None:
        """End the waits of this process and of its peers: they raise TransportError."""
        native.close(self._end)

    def _check(self, problem: str | None) -> None:
        if problem is not None:
            raise TransportError(f"{self._what}: {problem}")


class SharedMemoryTransport(_End):
    """A tensor-parallel group's `Transport`. Tensors are on the CPU."""

    def __init__(self, segment: Segment, layout: Layout, *, stage: int, rank: int, timeout_s: float) -> None:
        self._size = layout.tensor_parallel_size
        base = segment.address + layout.group(stage)
        first_rank = stage * self._size
        end = native.open_group(base, rank, self._size, layout.piece_bytes, first_rank, timeout_s)
        super().__init__(segment, end, f"shared memory of rank {first_rank + rank}")

    def all_reduce(self, x: torch.Tensor) -> None:
        if x.dtype != torch.float32:
            sum_in_order(self.all_gather(x), out=x)
            return
        own = x.contiguous()
        self._check(native.all_reduce(self._end, own.data_ptr(), _num_bytes(own)))
        if own is not x:
            x.copy_(own)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        own = x.contiguous()
        parts = torch.empty((self._size, *x.shape), dtype=x.dtype)
        self._check(native.all_gather(self._end, own.data_ptr(), _num_bytes(own), parts.data_ptr()))
        return list(parts.unbind())


class SharedMemoryLink(_End):
    """A `Link` between the stages `stage` and `stage` + 1."""

    def __init__(
        self,
        segment: Segment,
        layout: Layout,
        *,
        stage: int,
        tensor_rank: int,
        is_sender: bool,
        dtype: torch.dtype,
        timeout_s: float,
    ) -> None:
        sender = stage * layout.tensor_parallel_size + tensor_rank
        receiver = sender + layout.tensor_parallel_size
        own, peer = (sender, receiver) if is_sender else (receiver, sender)
        base = segment.address + layout.link(stage, tensor_rank)
        end = native.open_link(base, layout.ring_bytes, is_sender, peer, timeout_s)
        super().__init__(segment, end, f"link of rank {own}")
        self._is_sender = is_sender
        self._dtype = dtype

    def send(self, x: torch.Tensor) -> None:
        if not self._is_sender:
            raise ValueError("this end of the link receives")
        own = x.contiguous()
        self._check(native.send(self._end, own.data_ptr(), _num_bytes(own), _DTYPES.index(own.dtype)))

    def receive(self, shape: tuple[int, int]) -> torch.Tensor:
        if self._is_sender:
            raise ValueError("this end of the link sends")
        x = torch.empty(shape, dtype=self._dtype)
        self._check(native.receive(self._end, x.data_ptr(), _num_bytes(x), _DTYPES.index(x.dtype)))
        return x


def _num_bytes(x: torch.Tensor) -> int:
    if x.device.type != "cpu":
        raise ValueError(f"shared memory moves tensors of the CPU; got one on {x.device}")
    return x.numel() * x.element_size()


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
