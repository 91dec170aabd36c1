"""A gateway's connection to this replica: handshake, frames in, frames out (C22)."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterator
from typing import Protocol, cast

from serving import wire
from serving.types import ModelCard

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_UNSENT_BYTES = 4 << 20
MAX_STRANGER_FRAME_BYTES = 4 << 10
MAX_BEHIND = 64


class Host(Protocol):
    """What a connection needs of its replica."""

    secret: bytes
    epoch: int
    replica_id: str

    @property
    def card(self) -> ModelCard: ...

    def opened(self, connection: Connection) -> None: ...

    def received(self, connection: Connection, message: wire.FromGateway) -> None: ...

    def closed(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One gateway process. Before it has proved the secret it can make us do nothing else."""

    def __init__(self, host: Host, number: int) -> None:
        self.number = number
        self.gateway = "?"
        self.is_open = False
        self.num_submitted = 0
        self.granted = 0
        self.live: dict[int, wire.Submit] = {}  # by handle: submitted and not over
        self._host = host
        self._reader = wire.FrameReader(MAX_STRANGER_FRAME_BYTES)
        self._nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self._gateway_nonce: bytes | None = None
        self._transport: asyncio.Transport | None = None
        self._unsent: deque[bytes] = deque()  # step frames while the transport is full; beats overtake them
        self._behind: deque[Iterator[wire.Message]] = deque()  # assets: they wait for all else
        self._num_unsent_bytes = 0
        self._is_paused = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not a test of its class: uvloop's transports, which Serve installs, have no common base.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=64 << 10)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HANDSHAKE_TIMEOUT_S, self._refuse, "no handshake in time")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self.is_open:
            self.is_open = False
            self._host.closed(self)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                message = wire.decode_from_gateway(body)
                if self.is_open:
                    self._host.received(self, message)
                else:
                    self._shake_hands(message)
        except wire.WireError as error:
            self._refuse(str(error))

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()

    def send(self, message: wire.Message) -> None:
        """In order, after everything sent before. A gateway that does not read is cut off."""
        frame = wire.encode(message)
        if not self._is_paused:
            self._write(frame)
            return
        self._unsent.append(frame)
        self._num_unsent_bytes += len(frame)
        if self._num_unsent_bytes > MAX_UNSENT_BYTES:
            self._refuse(f"{self._num_unsent_bytes} bytes unsent")

    def send_ahead(self, message: wire.Message) -> None:
        """Before step frames that still wait: health must not queue behind work (C13)."""
        self._write(wire.encode(message))
        if self._is_paused and self._transport is not None:
            num_bytes = self._transport.get_write_buffer_size() + self._num_unsent_bytes
            if num_bytes > MAX_UNSENT_BYTES:
                self._refuse(f"{num_bytes} bytes unsent")

    def send_behind(self, messages: Iterator[wire.Message]) -> None:
        """One after the other, each taken only when nothing else waits to be sent.

        Raises WireError when too much is asked for at once.
        """
        if len(self._behind) >= MAX_BEHIND:
            raise wire.WireError(f"more than {MAX_BEHIND} assets asked for at once")
        self._behind.append(messages)
        self._flush()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        while self._unsent and not self._is_paused:
            frame = self._unsent.popleft()
            self._num_unsent_bytes -= len(frame)
            self._write(frame)
        while self._behind and not self._is_paused:
            message = next(self._behind[0], None)
            if message is None:
                self._behind.popleft()
            else:
                self._write(wire.encode(message))

    def _write(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def _shake_hands(self, message: wire.FromGateway) -> None:
        host = self._host
        if isinstance(message, wire.Hello) and self._gateway_nonce is None:
            if abs(message.version - wire.PROTOCOL_VERSION) > 1:
                raise wire.WireError(f"protocol version {message.version}, ours is {wire.PROTOCOL_VERSION}")
            if len(message.nonce) != wire.NONCE_BYTES:
                raise wire.WireError(f"nonce of {len(message.nonce)} bytes")
            self.gateway = message.gateway[:64]
            self._gateway_nonce = message.nonce
            mac = wire.prove(host.secret, "replica", message.nonce, self._nonce)
            reply = wire.HelloReply(wire.PROTOCOL_VERSION, host.card, host.epoch, host.replica_id, self._nonce, mac)
            self._write(wire.encode(reply))
        elif isinstance(message, wire.Prove) and self._gateway_nonce is not None:
            if not wire.is_proof(host.secret, "gateway", self._gateway_nonce, self._nonce, message.mac):
                raise wire.WireError("the secret is not proved")
            if self._deadline is not None:
                self._deadline.cancel()
            self.is_open = True
            self._reader.limit = wire.MAX_FRAME_BYTES
            host.opened(self)
        else:
            raise wire.WireError(f"{type(message).__name__} before the handshake")

    def _refuse(self, why: str) -> None:
        log.warning("closing connection %d of %r: %s", self.number, self.gateway, why)
        self.close()
