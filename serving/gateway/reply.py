"""Replies to generation requests, and what they share: the watch on the client.

A client may leave at any moment, streamed or not. One task per request waits for that and cancels
the choices at once (C22), whatever the reply itself is doing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.gateway.exchange import Exchange
from serving.gateway.faults import as_error

CLIENT = logging.getLogger("argosy.client")


class ClientConnection(Protocol):
    """The connection under a reply, as http.py offers it."""

    on_writable: Callable[[], None]
    """Called when writing may go on after `is_write_paused`."""

    @property
    def is_closing(self) -> bool:
        """Whether the client has gone, or is being sent away."""
        ...

    @property
    def is_write_paused(self) -> bool:
        """Whether enough is unsent."""
        ...

    def write_piece(self, data: bytes) -> None:
        """One piece of the body of the response under way. Never waits."""
        ...

    def abort(self) -> None:
        """Drop what is unsent and close."""
        ...

    def break_off(self) -> None:
        """Send what is unsent, then close without the end of the body."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """When a reply is looked at, and what silence means, in seconds."""

    period_s: float = 1.0
    first_comment_s: float = 2.0  # of silence: until then a failure is still a plain HTTP error
    comment_s: float = 5.0  # of silence: keeps proxies from closing the connection
    stall_s: float = 60.0  # a client that takes nothing for this long is gone


async def look_after(replies: set[Reply], pace: Pace) -> None:
    """Look at every open reply once per period, for ever: one task, so that none needs a timer."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(pace.period_s)
        now = loop.time()
        for reply in list(replies):
            reply.look(now)


class Reply(Response):
    """Serves an exchange to its client; subclasses say how."""

    def __init__(self, exchange: Exchange, replies: set[Reply], headers: dict[str, str]) -> None:
        # no body here: `serve` sends it
        self.status_code = 200
        self.background = None
        self.body = b""
        self.exchange = exchange
        self._replies = replies
        self.init_headers(headers)

    def init_headers(self, headers: dict[str, str] | None = None) -> None:  # type: ignore[override]
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def look(self, now: float) -> None:
        """Called once per period. now: the loop's time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._replies.add(self)
        watch = asyncio.create_task(self._watch(receive))
        is_disconnect, failure = True, None
        try:
            await self.serve(scope, receive, send)
            is_disconnect = self.exchange.has_left
        except Exception as error:
            is_disconnect, failure = False, as_error(error)
            raise
        finally:
            watch.cancel()
            self._replies.discard(self)
            self.exchange.leave()
            self.exchange.close(is_disconnect, failure)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.exchange.leave()


class WholeReply(Reply):
    """One JSON document when every choice has ended."""

    media_type = "application/json"

    def __init__(
        self, exchange: Exchange, replies: set[Reply], headers: dict[str, str], document: Callable[[], bytes]
    ) -> None:
        super().__init__(exchange, replies, headers)
        self._document = document
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.exchange.listen(self._read)
        await self._ended
        if self.exchange.has_left:
            return
        reply = Response(self._document(), headers=dict(self.headers), media_type="application/json")
        await reply(scope, receive, send)

    def _read(self) -> None:
        """Read the journals as they grow: stop strings end a choice early."""
        exchange = self.exchange
        if self._ended.done():
            return
        try:
            exchange.render()
        except Exception as error:
            self._ended.set_exception(error)
            return
        if exchange.is_over or exchange.has_left:
            self._ended.set_result(None)
        elif exchange.has_more:
            exchange.wake()
