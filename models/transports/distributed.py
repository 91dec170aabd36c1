"""Ranks of several hosts, or of one without shared memory: torch.distributed's gloo, and NCCL between GPUs.

Process groups are built directly and belong to whoever asked for them: no default group, no state of
the process, no environment variable. Every socket is bound to one address (C20).

gloo is proved by the tests. NCCL goes the same way but has run on no machine of ours: it needs two GPUs.
"""

from __future__ import annotations

import collections
import datetime
import socket
import time
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from models.parallel import TransportError, sum_in_order

_SLICE: Final = datetime.timedelta(seconds=0.1)  # how late a wait may notice that it was closed


def address_facing(host: str, port: int) -> str:
    """The address of this host from which `host` is reached; loopback for loopback. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


class ProcessGroup:
    """The ranks of one group or link, connected."""

    def __init__(
        self, kind: str, store: Store, rank: int, size: int, *, address: str, timeout_s: float, what: str
    ) -> None:
        """Waits for all ranks. kind: "gloo" | "nccl". address: what this rank's sockets are bound to.

        Raises TransportError when the others do not come in time.
        """
        self.rank = rank
        self.size = size
        self.device = torch.device("cpu" if kind == "gloo" else "cuda")
        self._what = what
        self._timeout_s = timeout_s
        self._is_closed = False
        try:
            self._group = (_gloo if kind == "gloo" else _nccl)(store, rank, size, address, timeout_s)
        except RuntimeError as error:
            raise TransportError(f"{what}: {_first_line(error)}") from error

    def all_reduce(self, x: torch.Tensor) -> None:
        self.wait(self._group.allreduce([x]))

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor) -> None:
        self.wait(self._group.allgather([parts], [x]))

    def start_broadcast(self, x: torch.Tensor, root: int) -> Any:
        """`x` of rank `root` into everybody's. The work to `wait` for; `x` must live until then."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        try:
            return self._group.broadcast([x], options)
        except RuntimeError as error:
            raise TransportError(f"{self._what}: {_first_line(error)}") from error

    def wait(self, work: Any) -> None:
        """Until the work is done. Raises TransportError: a peer has gone or is late, or `close` was called."""
        if self.device.type == "cuda":
            work.wait()  # orders streams; NCCL's own watchdog and `abort` end what hangs
            return
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as error:
                if work.is_completed():  # with this failure; else only the slice is over
                    raise TransportError(f"{self._what}: {_first_line(error)}") from error
            if self._is_closed:
                raise TransportError(f"{self._what}: closed by this process")
            if time.monotonic() > deadline:
                raise TransportError(f"{self._what}: the peers did not come within {self._timeout_s:g} s")

    def close(self) -> None:
        """End the waits of this process: they raise TransportError. Peers learn it when the process ends."""
        self._is_closed = True
        if self.device.type == "cuda":
            self._group.abort()


class DistributedTransport:
    """A tensor-parallel group's `Transport` over gloo or NCCL."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def all_reduce(self, x: torch.Tensor) -> None:
        """Two addends commute; with more a ring's order of additions depends on size and rank (C4)."""
        own = x.contiguous()
        if self._group.size == 2:
            self._group.all_reduce(own)
        else:
            sum_in_order(self.all_gather(own), out=own)
        if own is not x:
            x.copy_(own)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self._group.size)]
        self._group.all_gather(parts, own)
        return parts

    def close(self) -> None:
        self._group.close()


class DistributedLink:
    """A `Link` over a group of two: the sender is rank 0, and a tensor is a broadcast from it.

    A broadcast, and not a send: gloo runs it in a thread of its own, so that the sender goes on and a
    waiting receiver can be called off.
    """

    def __init__(self, group: ProcessGroup, *, num_slots: int, dtype: torch.dtype) -> None:
        self._group = group
        self._num_slots = num_slots
        self._dtype = dtype
        self._under_way: collections.deque[tuple[Any, torch.Tensor]] = collections.deque()

    def send(self, x: torch.Tensor) -> None:
        if self._group.rank != 0:
            raise ValueError("this end of the link receives")
        while self._under_way and (len(self._under_way) >= self._num_slots or self._under_way[0][0].is_completed()):
            self._group.wait(self._under_way[0][0])
            self._under_way.popleft()
        copy = x.clone(memory_format=torch.contiguous_format)  # the caller may overwrite x
        self._under_way.append((self._group.start_broadcast(copy, root=0), copy))

    def receive(self, shape: tuple[int, int]) -> torch.Tensor:
        if self._group.rank != 1:
            raise ValueError("this end of the link sends")
        x = torch.empty(shape, dtype=self._dtype, device=self._group.device)
        self._group.wait(self._group.start_broadcast(x, root=0))
        return x

    def close(self) -> None:
        self._group.close()


def _gloo(store: Store, rank: int, size: int, address: str, timeout_s: float) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # torch's own type hints name neither
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return gloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, address: str, timeout_s: float) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return nccl(store, rank, size, options)


def _first_line(error: BaseException) -> str:
    """Without the C++ stack that torch appends."""
    return str(error).partition("\n")[0]
