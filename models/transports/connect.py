"""How the ranks of a gang find each other, and what each of them then has."""

from __future__ import annotations

import dataclasses
import datetime
import socket
from typing import Final

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from models.parallel import Group, Link, Stages, Transport, TransportError
from models.transports.distributed import DistributedLink, DistributedTransport, ProcessGroup, address_facing
from models.transports.shared_memory import (
    Layout,
    Segment,
    SegmentOffer,
    SharedMemoryLink,
    SharedMemoryTransport,
    is_available,
    open_segment,
)

KINDS: Final = ("shared-memory", "gloo", "nccl")
SLOT_BYTES: Final = 1 << 20


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """A rank's place in its gang and where the gang meets. Plain values: it travels to other processes.

    rank: world rank, stage * tensor_parallel_size + place in the group.
    kind: "shared-memory" (all ranks on one host, tensors on the CPU) | "gloo" | "nccl".
    name: unique per start of a gang.
    host, port: of the store (`host_store`).
    slot_bytes: the largest tensor that a step usually moves; larger ones go in pieces.
    dtype: of what the links carry, as torch names it.
    """

    rank: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    kind: str
    name: str
    host: str
    port: int
    slot_bytes: int = SLOT_BYTES
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}; got {self.rank}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must be one of torch's; got {self.dtype!r}")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def stage(self) -> int:
        return self.rank // self.tensor_parallel_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_parallel_size


@dataclasses.dataclass
class Ranks:
    """What a rank moves tensors with."""

    group: Group
    stages: Stages
    before: Link | None  # from the previous stage; None at the first
    after: Link | None  # to the next stage; None at the last
    transport: Transport | None  # the group's; None for a group of one

    def close(self) -> None:
        """Any thread: whoever waits in this process for a peer raises TransportError."""
        for end in (self.transport, self.before, self.after):
            if end is not None:
                end.close()


def host_store(host: str = "127.0.0.1") -> TCPStore:
    """Where the ranks meet, listening on a free port of `host` alone; its `port` goes into every Rendezvous.

    Keep it until all ranks have connected. It knows no secret: `host` must be loopback or a network
    of the cluster's own. Raises OSError when the address cannot be bound.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


def connect(rendezvous: Rendezvous, timeout_s: float = 60.0) -> Ranks:
    """Meet the other ranks. All of them must call this, with the same name, sizes and kind.

    timeout_s: how long to wait for the others here, and later within any operation.
    Raises TransportError.
    """
    place = rendezvous
    group_of = (place.tensor_rank, place.tensor_parallel_size)
    stages = Stages(place.stage, place.pipeline_parallel_size)
    if place.world_size == 1:
        return Ranks(Group(), stages, None, None, None)
    try:
        client = TCPStore(place.host, place.port, timeout=datetime.timedelta(seconds=timeout_s))
        store = PrefixStore(place.name, client)
        if place.kind == "shared-memory":
            transport, before, after = _through_memory(place, store, timeout_s)
        else:
            transport, before, after = _through_sockets(place, store, timeout_s)
    except DistError as error:
        told = str(error).partition("\n")[0]
        raise TransportError(f"rank {place.rank} of gang {place.name}: {told}") from error
    return Ranks(Group(*group_of, transport), stages, before, after, transport)


def _through_memory(
    place: Rendezvous, store: Store, timeout_s: float
) -> tuple[Transport | None, Link | None, Link | None]:
    if not is_available():
        raise TransportError("shared memory between ranks needs Linux and an installation with a compiler; use gloo")
    layout = Layout(place.name, place.tensor_parallel_size, place.pipeline_parallel_size, place.slot_bytes)
    segment = _share_segment(place, store, layout)
    stage, tensor_rank, dtype = place.stage, place.tensor_rank, getattr(torch, place.dtype)

    def link(from_stage: int, *, is_sender: bool) -> Link:
        return SharedMemoryLink(
            segment,
            layout,
            stage=from_stage,
            tensor_rank=tensor_rank,
            is_sender=is_sender,
            dtype=dtype,
            timeout_s=timeout_s,
        )

    transport = None
    if place.tensor_parallel_size > 1:
        transport = SharedMemoryTransport(segment, layout, stage=stage, rank=tensor_rank, timeout_s=timeout_s)
    before = link(stage - 1, is_sender=False) if stage > 0 else None
    after = link(stage, is_sender=True) if stage < place.pipeline_parallel_size - 1 else None
    return transport, before, after


def _share_segment(place: Rendezvous, store: Store, layout: Layout) -> Segment:
    if place.rank > 0:
        segment = open_segment(store.get("segment").decode(), layout)
        store.set(f"mapped/{place.rank}", "")
        return segment
    offer = SegmentOffer(layout)
    try:
        store.set("segment", offer.path)
        for rank in range(1, place.world_size):
            try:
                store.wait([f"mapped/{rank}"])
            except DistError as error:
                raise TransportError(f"rank {rank} of gang {place.name} has not mapped the shared memory") from error
    finally:
        offer.close()
    return offer.segment


def _through_sockets(
    place: Rendezvous, store: Store, timeout_s: float
) -> tuple[Transport | None, Link | None, Link | None]:
    address = address_facing(place.host, place.port)
    dtype = getattr(torch, place.dtype)

    def group(name: str, rank: int, size: int) -> ProcessGroup:
        what = f"{place.kind} of rank {place.rank}, {name}"
        prefixed = PrefixStore(name, store)
        return ProcessGroup(place.kind, prefixed, rank, size, address=address, timeout_s=timeout_s, what=what)

    def link(from_stage: int, *, is_sender: bool) -> Link:
        ends = group(f"link {from_stage}.{place.tensor_rank}", 0 if is_sender else 1, 2)
        return DistributedLink(ends, num_slots=place.pipeline_parallel_size + 1, dtype=dtype)

    transport = None
    if place.tensor_parallel_size > 1:
        transport = DistributedTransport(group(f"stage {place.stage}", place.tensor_rank, place.tensor_parallel_size))
    # From the first stage on: who waits here for the stage before waits for nobody behind.
    before = link(place.stage - 1, is_sender=False) if place.stage > 0 else None
    after = link(place.stage, is_sender=True) if place.stage < place.pipeline_parallel_size - 1 else None
    return transport, before, after
