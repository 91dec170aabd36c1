"""The socket under a link: dialling, handshake, frames (C22)."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from typing import cast

from serving import wire
from serving.errors import SettingsError
from serving.gateway.link import Cause, Link, LinkOwner
from serving.types import ModelCard

HANDSHAKE_TIMEOUT_S = 1.5
OLDEST_VERSION = max(wire.PROTOCOL_VERSION - 1, 1)
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def parse_endpoint(endpoint: str) -> tuple[str, int] | str:
    """(host, port) of "tcp:<host>:<port>", or the path of "unix:<path>". Raises SettingsError."""
    scheme, _, rest = endpoint.partition(":")
    if scheme == "unix" and rest:
        return rest
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdecimal() and 0 < int(port) < 65536:
        return host.removeprefix("[").removesuffix("]"), int(port)
    raise SettingsError(f'replica endpoint {endpoint!r}: expected "unix:<path>" or "tcp:<host>:<port>"')


class Connection(asyncio.Protocol):
    """One socket to one replica; `opened` yields the link once both sides have proved the secret."""

    def __init__(
        self,
        *,
        secrets: tuple[bytes, ...],
        gateway: str,
        owner: LinkOwner,
        clock: Callable[[], float],
        is_draining: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[Link] = loop.create_future()
        self.lost = asyncio.Event()
        self._loop = loop
        self._secrets = secrets
        self._gateway = gateway
        self._owner = owner
        self._clock = clock
        self._is_draining = is_draining
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self._reader = wire.FrameReader()
        self._transport: asyncio.Transport | None = None
        self._link: Link | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(wire.encode(wire.Hello(wire.PROTOCOL_VERSION, self._gateway, self._nonce)))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                message = wire.decode_from_replica(body)
                if self._link is not None:
                    self._link.receive(message)
                elif self.opened.done():
                    return  # the handshake failed or was given up
                else:
                    self._shake(message)
        except wire.WireError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        if self._link is not None:
            self._link.end(Cause.LOST, str(exc or "end of stream"))
        elif not self.opened.done():
            self._refuse(ConnectionError(str(exc or "closed during the handshake")))

    def abort(self) -> None:
        """Drops the socket at once."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, frame: bytes) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():  # else its rows are about to come back
            transport.write(frame)

    def _fail(self, error: wire.WireError) -> None:
        if self._link is not None:
            self._link.end(Cause.FAULTY, str(error))
            return
        if not self.opened.done():
            self._refuse(error)
        self.abort()

    def _refuse(self, error: Exception) -> None:
        self.opened.set_exception(error)
        self.opened.exception()  # whoever dialled may have given up: nobody need retrieve it

    def _shake(self, message: wire.FromReplica) -> None:
        if not isinstance(message, wire.HelloReply):
            raise wire.WireError(f"{type(message).__name__} before the handshake")
        if message.version < OLDEST_VERSION:
            raise wire.WireError(f"protocol version {message.version}: this gateway speaks {wire.PROTOCOL_VERSION}")
        if len(message.nonce) != wire.NONCE_BYTES:
            raise wire.WireError(f"nonce of {len(message.nonce)} bytes: expected {wire.NONCE_BYTES}")
        for secret in self._secrets:  # while they rotate, replicas have the old one or the new
            if wire.is_proof(secret, "replica", self._nonce, message.nonce, message.mac):
                break
        else:
            raise wire.WireError("the replica does not know the secret")
        _check_card(message.card)
        self._write(wire.encode(wire.Prove(wire.prove(secret, "gateway", self._nonce, message.nonce))))
        self._link = Link(
            message,
            self._owner,
            write=self._write,
            abort=self.abort,
            defer=self._loop.call_soon,
            clock=self._clock,
        )
        self._link.is_draining = self._is_draining
        self.opened.set_result(self._link)


def _check_card(card: ModelCard) -> None:
    """Raises WireError for facts that later arithmetic or paths could not bear."""
    if not card.fingerprint or not card.model:
        raise wire.WireError("model card without fingerprint or model")
    if not 0 < card.tokenizer_size < 1 << 31 or card.max_model_len < 1:
        raise wire.WireError(f"model card: tokenizer_size {card.tokenizer_size}, max_model_len {card.max_model_len}")
    for name, sha256 in card.assets.items():
        if not _SHA256.match(sha256):
            raise wire.WireError(f"model card: asset {name!r} without a sha256")


async def dial(
    endpoint: str,
    *,
    secrets: tuple[bytes, ...],
    gateway: str,
    owner: LinkOwner,
    clock: Callable[[], float],
    is_draining: bool = False,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
) -> tuple[Connection, Link]:
    """Connects and shakes hands.

    Raises OSError when nobody answers, TimeoutError when nobody speaks, WireError when it is no replica
    of ours.
    """
    loop = asyncio.get_running_loop()
    target = parse_endpoint(endpoint)

    def protocol() -> Connection:
        return Connection(secrets=secrets, gateway=gateway, owner=owner, clock=clock, is_draining=is_draining)

    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(target, str):
                _, connection = await loop.create_unix_connection(protocol, target)
            else:
                _, connection = await loop.create_connection(protocol, *target)
            return connection, await connection.opened
    except BaseException:
        if connection is not None:
            connection.abort()
        raise
