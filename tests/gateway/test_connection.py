"""The socket under a link: handshakes that must fail, frames that must not be believed (C22)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest

from serving import wire
from serving.errors import SettingsError
from serving.gateway.connection import Connection, dial, parse_endpoint
from serving.gateway.link import Link
from serving.types import ModelCard
from tests.faults import SECRET, FakeReplica
from tests.gateway.plane import run, socket_paths, until
from tests.gateway.test_link import Owner
from tests.scripted import make_card


async def connect(endpoint: str, *, secret: str = SECRET, timeout_s: float = 1.0) -> tuple[Connection, Link]:
    return await dial(
        endpoint,
        secrets=tuple(bytes.fromhex(one) for one in secret.split(",")),
        gateway="gateway-0",
        owner=Owner(),
        clock=time.monotonic,
        timeout_s=timeout_s,
    )


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("unix:/run/r0", "/run/r0"),
        ("tcp:127.0.0.1:7600", ("127.0.0.1", 7600)),
        ("tcp:[::1]:7600", ("::1", 7600)),
        ("tcp:host.example:1", ("host.example", 1)),
    ],
)
def test_endpoints(endpoint: str, target: object) -> None:
    assert parse_endpoint(endpoint) == target


@pytest.mark.parametrize("endpoint", ["", "unix:", "tcp:host", "tcp::7600", "tcp:h:0", "tcp:h:65536", "http://h:1"])
def test_an_endpoint_that_cannot_be_dialled_is_named(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="replica endpoint"):
        parse_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["unix", "tcp:127.0.0.1:17643"])
def test_a_handshake_over_either_transport(endpoint: str) -> None:
    async def scenario() -> None:
        with socket_paths(1) as (path,):
            at = path if endpoint == "unix" else endpoint
            async with FakeReplica(at) as replica:
                connection, link = await connect(at)
                assert (link.replica, link.epoch, link.card) == ("replica-0", 1, replica.card)
                await until(lambda: link.num_permits > 0)
                assert link.state == "ready"
                connection.abort()
                await connection.lost.wait()
                assert link.cause == "lost"

    run(scenario())


def test_a_replica_with_another_secret_learns_nothing() -> None:
    async def scenario() -> None:
        with socket_paths(1) as (path,):
            async with FakeReplica(path, secret="bad0") as replica:
                with pytest.raises(wire.WireError, match="does not know the secret"):
                    await connect(path)
                await asyncio.sleep(0.02)
                assert replica.num_connections == 0  # no proof was sent
                assert replica.violations == []

    run(scenario())


def test_a_newer_replica_is_understood_and_an_older_one_is_not() -> None:
    async def scenario() -> None:
        with socket_paths(2) as (newer, older):
            async with FakeReplica(newer, version=wire.PROTOCOL_VERSION + 1), FakeReplica(older, version=0):
                connection, _ = await connect(newer)
                connection.abort()
                with pytest.raises(wire.WireError, match="protocol version 0"):
                    await connect(older)

    run(scenario())


def hello(card: ModelCard | None = None, nonce_bytes: int = wire.NONCE_BYTES) -> Callable[[wire.Hello], bytes]:
    def reply(message: wire.Hello) -> bytes:
        nonce = os.urandom(nonce_bytes)
        mac = wire.prove(bytes.fromhex(SECRET), "replica", message.nonce, nonce)
        return wire.encode(wire.HelloReply(1, card or make_card(), 1, "r", nonce, mac))

    return reply


def reflected(message: wire.Hello) -> bytes:
    """An impostor that has the gateway prove to itself."""
    return wire.encode(wire.HelloReply(1, make_card(), 1, "r", message.nonce, b"\0" * 32))


def bad_card(**fields: object) -> Callable[[wire.Hello], bytes]:
    import msgspec

    return hello(msgspec.structs.replace(make_card(), **fields))


IMPOSTORS: list[tuple[str, Callable[[wire.Hello], bytes]]] = [
    ("not a replica message", lambda _: b"\x04\0\0\0junk"),
    ("exceeds the limit", lambda _: b"\xff\xff\xff\x7f"),
    ("exceeds the limit", lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ("exceeds the limit", lambda _: b"\x80\x05\x95\x8c\x08builtins\x94\x8c\x04exec\x94"),
    ("before the handshake", lambda _: wire.encode(wire.Asset("a", "", b""))),
    ("does not know the secret", reflected),
    ("nonce of 3 bytes", hello(nonce_bytes=3)),
    ("without fingerprint", bad_card(fingerprint="")),
    ("tokenizer_size 0", bad_card(tokenizer_size=0)),
    ("tokenizer_size 2147483648", bad_card(tokenizer_size=1 << 31)),
    ("without a sha256", bad_card(assets={"tokenizer.json": "../../etc/passwd"})),
]


@pytest.mark.parametrize(("message", "answer"), IMPOSTORS)
def test_an_impostor_is_refused(message: str, answer: Callable[[wire.Hello], bytes]) -> None:
    async def scenario() -> None:
        seen = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (size,) = wire.HEADER.unpack(await reader.readexactly(4))
            greeting = wire.decode_from_gateway(await reader.readexactly(size))
            assert isinstance(greeting, wire.Hello)
            writer.write(answer(greeting))
            seen.append(await reader.read())
            writer.close()

        with socket_paths(1) as (path,):
            server = await asyncio.start_unix_server(serve, path.removeprefix("unix:"))
            with pytest.raises(wire.WireError, match=message):
                await connect(path)
            await until(lambda: seen == [b""])  # nothing was said after the lie
            server.close()

    run(scenario())


def test_nobody_there_nobody_speaking_and_a_closed_door() -> None:
    async def scenario() -> None:
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async def shut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        with socket_paths(3) as (nobody, silent, closed):
            servers = [
                await asyncio.start_unix_server(serve, path.removeprefix("unix:"))
                for serve, path in ((mute, silent), (shut, closed))
            ]
            with pytest.raises(FileNotFoundError):
                await connect(nobody)
            with pytest.raises(TimeoutError):
                await connect(silent, timeout_s=0.05)
            with pytest.raises(ConnectionError):
                await connect(closed)
            for server in servers:
                server.close()
            await asyncio.sleep(0.01)

    run(scenario())


def test_a_handshake_may_arrive_byte_by_byte() -> None:
    async def scenario() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (size,) = wire.HEADER.unpack(await reader.readexactly(4))
            greeting = wire.decode_from_gateway(await reader.readexactly(size))
            assert isinstance(greeting, wire.Hello)
            for byte in hello()(greeting):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            await reader.read()
            writer.close()

        with socket_paths(1) as (path,):
            server = await asyncio.start_unix_server(serve, path.removeprefix("unix:"))
            connection, link = await connect(path)
            assert link.replica == "r"
            connection.abort()
            await connection.lost.wait()
            server.close()
            await asyncio.sleep(0.01)

    run(scenario())
