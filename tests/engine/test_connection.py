"""A connection's promises on memory and order, on a transport whose peer reads when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from serving import wire
from serving.engine.connection import MAX_BEHIND, MAX_STRANGER_FRAME_BYTES, MAX_UNSENT_BYTES, Connection
from serving.types import ModelCard, SamplingParams

CARD = ModelCard(
    fingerprint="f",
    model="m",
    max_model_len=8,
    max_num_seqs=1,
    logits_size=8,
    tokenizer_size=8,
    eos_ids=(),
    bos_id=None,
    block_size=16,
    determinism="exact",
    assets={},
)
SECRET = b"secret"


class Host:
    secret, epoch, replica_id, card = SECRET, 1, "r", CARD

    def __init__(self) -> None:
        self.messages: list[wire.FromGateway] = []

    def opened(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None: ...

    def received(self, connection: Connection, message: wire.FromGateway) -> None:
        self.messages.append(message)


class Transport:
    """Keeps what is written until the peer reads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.buffer = bytearray()
        self.most_buffered = 0
        self.is_aborted = False
        connection.connection_made(self)  # type: ignore[arg-type]

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def write(self, data: bytes) -> None:
        self.buffer += data
        self.most_buffered = max(self.most_buffered, len(self.buffer))
        if len(self.buffer) > self.high:
            self.connection.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def read(self) -> list[wire.FromReplica]:
        """The peer reads everything, again and again, until nothing more comes."""
        messages: list[wire.FromReplica] = []
        reader = wire.FrameReader()
        while self.buffer:
            data, self.buffer = bytes(self.buffer), bytearray()
            messages += [wire.decode_from_replica(body) for body in reader.feed(data)]
            self.connection.resume_writing()
        return messages


@pytest.fixture
def transport() -> Iterator[Transport]:
    """Of a connection that has shaken hands."""

    async def connect() -> Transport:
        transport = Transport(Connection(Host(), 1))
        connection = transport.connection
        connection.data_received(wire.encode(wire.Hello(wire.PROTOCOL_VERSION, "g", bytes(16))))
        (reply,) = transport.read()
        assert isinstance(reply, wire.HelloReply)
        connection.data_received(wire.encode(wire.Prove(wire.prove(SECRET, "gateway", bytes(16), reply.nonce))))
        assert connection.is_open
        return transport

    yield asyncio.run(connect())


def beat() -> wire.Beat:
    return wire.Beat(1, "ready", 1, 0.0, 0.0, 0, 0, 0, 1, 1, [])


def step(num_bytes: int) -> wire.Step:
    return wire.Step(1, bytes(num_bytes), [], [], [], 1)


def pieces(size: int, count: int) -> Iterator[wire.Asset]:
    for at in range(count):
        yield wire.Asset("a", "0", bytes(size), at * size, size * count)


def test_a_gateway_that_never_reads_its_beats_is_cut_off(transport: Transport) -> None:
    for _ in range(1_000_000):
        transport.connection.send_ahead(beat())
        if transport.is_aborted:
            break
    assert transport.is_aborted
    assert transport.most_buffered <= MAX_UNSENT_BYTES + 1000


def test_a_gateway_that_never_reads_its_steps_is_cut_off(transport: Transport) -> None:
    for _ in range(1000):
        if not transport.is_aborted:
            transport.connection.send(step(64 << 10))
    assert transport.is_aborted
    assert transport.most_buffered <= 256 << 10


def test_beats_overtake_steps_and_steps_overtake_assets(transport: Transport) -> None:
    connection = transport.connection
    connection.send_behind(pieces(100 << 10, 3))
    connection.send(step(1 << 10))
    connection.send(step(2 << 10))
    connection.send_ahead(beat())
    kinds = [type(message).__name__ for message in transport.read()]
    assert kinds == ["Asset", "Beat", "Step", "Step", "Asset", "Asset"]


def test_an_asset_of_any_size_takes_the_memory_of_a_piece(transport: Transport) -> None:
    transport.connection.send_behind(pieces(256 << 10, 100))
    received = transport.read()
    assert sum(len(message.data) for message in received if isinstance(message, wire.Asset)) == 100 * (256 << 10)
    assert transport.most_buffered < 512 << 10
    assert not transport.is_aborted


def test_assets_asked_for_without_end_cost_the_connection(transport: Transport) -> None:
    for _ in range(MAX_BEHIND):
        transport.connection.send_behind(pieces(100 << 10, 2))
    with pytest.raises(wire.WireError, match="more than 64 assets"):
        transport.connection.send_behind(pieces(100 << 10, 2))


def test_a_stranger_cannot_make_us_buffer_a_large_frame() -> None:
    async def connect() -> Transport:
        transport = Transport(Connection(Host(), 1))
        transport.connection.data_received(wire.HEADER.pack(MAX_STRANGER_FRAME_BYTES + 1))
        return transport

    assert asyncio.run(connect()).is_aborted


def test_a_large_frame_after_the_handshake_is_fine(transport: Transport) -> None:
    frame = wire.encode(wire.Submit(1, "r", bytes(1 << 20), b"", SamplingParams()))
    transport.connection.data_received(frame[:1000])
    transport.connection.data_received(frame[1000:])
    assert not transport.is_aborted
