"""What rank 0 and the other ranks of its gang tell each other (C5, C11): frames over one stream socket each.

    rank 0                                       rank 1 … N-1
                                             <-  Pulse, at once and then ten times a second
    Setup(settings, place, …)                ->
                                             <-  Loaded | Failed        (all load at the same time)
    Begin(num_blocks)                        ->
    plan, plan, …                            ->
                                             <-  Sampled | Passed, one per step, from one rank of a stage

A frame is a little-endian u32 length, a u32 kind and the body: a plan's words as they are, so that
they are encoded once for all ranks, or a tagged msgpack array. Both ends come from one installation
and trust each other: whoever connects them proves the secret first. The end of a connection is the
end of the gang, on both sides.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from models.transports.connect import Rendezvous
from serving.config import EngineSettings
from serving.engine.request import Int32Array

HEADER = struct.Struct("<II")
MAX_FRAME_BYTES = 1 << 30
_MESSAGE, _PLAN = 1, 2


class Message(msgspec.Struct, array_like=True):
    """A tagged msgpack array."""


class Pulse(Message, tag=1):
    """A rank's beat, from a thread that does nothing else (C13)."""

    is_loading: bool
    step: int  # steps completed
    age_s: float  # of the running step; 0 = waiting for a plan
    pid: int
    host: str
    machine: str  # equal for two ranks that can signal each other and share memory


class Loaded(Message, tag=2):
    """A rank's share of the model is in memory; its KV cache is not yet."""

    num_blocks: int  # that would fit
    num_parameters: int  # of its stage
    weight_bytes: int  # of this rank
    seconds: float
    agreed: dict[str, str]  # what must be equal on every rank, by name: the parts of the fingerprint


class Failed(Message, tag=3):
    """The rank ends; the text says why."""

    text: str


class Sampled(Message, tag=4):
    """The result of a step, from the rank that samples. Fields as in runner.StepResult."""

    step: int
    ids: bytes
    logprobs: dict[int, bytes]
    busy_s: float


class Passed(Message, tag=5):
    """A stage has handed a step on. busy_s: how long it computed, without waiting for the stage before."""

    stage: int
    step: int
    busy_s: float


class Setup(Message, tag=6):
    settings: EngineSettings
    place: Rendezvous
    num_neighbours: int  # ranks on the same machine, this one included


class Begin(Message, tag=7):
    num_blocks: int


ToRank = Setup | Begin
FromRank = Pulse | Loaded | Failed | Sampled | Passed

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def message_frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    return HEADER.pack(len(body), _MESSAGE) + body


def plan_frame(words: Int32Array) -> bytes:
    return HEADER.pack(words.nbytes, _PLAN) + words.tobytes()


def receive(sock: socket.socket) -> ToRank | Int32Array:
    """The next message or plan of rank 0; waits for it. Raises EOFError at the end of the connection."""
    length, kind = HEADER.unpack(_exactly(sock, HEADER.size))
    body = _exactly(sock, length)
    return np.frombuffer(body, np.int32) if kind == _PLAN else _to_rank.decode(body)


def _exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            received = sock.recv_into(view)
        except ConnectionError:  # it was killed before it had read everything
            received = 0
        if received == 0:
            raise EOFError("rank 0 closed the connection")
        view = view[received:]
    return data


class RankReader:
    """Cuts what a rank sends into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[FromRank]:
        """Messages that `data` completes. Raises ValueError for what is none."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            length, kind = HEADER.unpack_from(self._buffer)
            if kind != _MESSAGE or length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of kind {kind} and {length} bytes")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            message = _from_rank.decode(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
            yield message


def machine() -> str:
    """Where this process is: host, boot and PID namespace, for names of hosts may repeat among containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    parts += [boot.read_text().strip()] if boot.exists() else []
    parts += [os.readlink(namespace)] if namespace.exists() else []  # noqa: PTH115
    return "/".join(parts)
