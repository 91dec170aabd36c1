"""The ceiling of a gateway (F0): a bare uvloop protocol that writes one ready-made event to every client per step.

Everything that a gateway does beyond this is its own cost. A process of its own, on an inherited socket.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from typing import cast

import msgspec
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class RawSettings(msgspec.Struct, frozen=True, kw_only=True):
    fd: int
    event: str  # as the gateway under test writes it
    step_s: float


class RawClient(asyncio.Protocol):
    """One client; whatever it sends first is its request."""

    def __init__(self, clients: list[asyncio.Transport]) -> None:
        self._clients = clients
        self._has_asked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._has_asked:
            self._has_asked = True
            self._transport.write(HEAD)
            self._clients.append(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport in self._clients:
            self._clients.remove(self._transport)


async def serve(settings: RawSettings) -> None:
    loop = asyncio.get_running_loop()
    clients: list[asyncio.Transport] = []
    await loop.create_server(lambda: RawClient(clients), sock=socket.socket(fileno=settings.fd))
    event = settings.event.encode()
    piece = b"%x\r\n%b\r\n" % (len(event), event)
    due = time.monotonic()
    while True:
        due += settings.step_s
        await asyncio.sleep(due - time.monotonic())
        for client in clients:
            client.write(piece)


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=RawSettings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))


if __name__ == "__main__":
    main()
