"""A streamed reply: server-sent events, written at the client's pace.

A token passes here, so no task does: when journals have grown, the loop calls `_pump`, which renders
and writes in one go. Only the beginning and the end of the response go through ASGI. Nothing is
rendered while the client's buffer is full; the journal grows instead. A stream that fails sends its
error and breaks the connection: a clean end would read as success.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from starlette.types import Receive, Scope, Send

from serving.errors import ArgosyError, EngineError
from serving.gateway.exchange import Exchange
from serving.gateway.faults import error_json
from serving.gateway.reply import CLIENT, ClientConnection, Pace, Reply

DONE = b"data: [DONE]\n\n"


class EventStream(Reply):
    """One client's stream of events. Needs a server whose scopes carry "argosy.connection" (http.py)."""

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(
        self,
        exchange: Exchange,
        replies: set[Reply],
        headers: dict[str, str],
        tail: Callable[[], bytes],
        pace: Pace,
    ) -> None:
        """tail: events after the last choice has ended (usage), before [DONE]."""
        super().__init__(exchange, replies, {"cache-control": "no-cache", "x-accel-buffering": "no"} | headers)
        loop = asyncio.get_running_loop()
        self._tail = tail
        self._pace = pace
        self._connection: ClientConnection | None = None  # once the response has begun
        self._first: asyncio.Future[bytes] = loop.create_future()  # what the response begins with
        self._last: asyncio.Future[bytes] = loop.create_future()  # and what it ends with
        self._is_comment_due = False
        self._has_written = False  # since the last look
        self._quiet_since = loop.time()
        self._blocked_since: float | None = None

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self.exchange
        connection = cast(ClientConnection, scope["extensions"]["argosy.connection"])
        exchange.listen(self._pump)
        first = await self._first  # until now a failure is a plain HTTP error
        if exchange.has_left:
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            connection.on_writable = self._resume
            self._connection = connection
            if exchange.is_over:
                data = first + self._tail() + DONE
            else:
                connection.write_piece(first)
                self._pump()
                data = await self._last
            if not exchange.has_left:
                await send({"type": "http.response.body", "body": data, "more_body": False})
        except ArgosyError as error:
            self._break_off(connection, error)
        except Exception:
            self._break_off(connection, EngineError("The server failed while it rendered this stream."))
            raise
        finally:
            connection.on_writable = _nothing

    def _pump(self) -> None:
        """Render what has grown and write it, until nothing is left or the client is full."""
        connection = self._connection
        if connection is None:
            self._begin()
            return
        exchange = self.exchange
        try:
            while not self._last.done():
                if exchange.has_left:
                    self._last.set_result(b"")
                    return
                if connection.is_write_paused and exchange.failure is None:
                    return
                data = b"" if exchange.is_over else exchange.render()
                if exchange.is_over:
                    self._last.set_result(data + self._tail() + DONE)
                    return
                if data:
                    connection.write_piece(data)
                    self._has_written = True
                elif exchange.has_more:
                    exchange.wake()  # a long stretch without text: others first
                    return
                elif self._is_comment_due:
                    self._is_comment_due = False
                    connection.write_piece(self._comment())
                else:
                    return
                if not exchange.has_more:
                    return
        except Exception as error:
            self._last.set_exception(error)

    def _begin(self) -> None:
        """Find out what the response begins with: events, a comment, or a plain error instead."""
        exchange = self.exchange
        if self._first.done():
            return
        try:
            data = b"" if exchange.has_left else exchange.render()
        except Exception as error:
            self._first.set_exception(error)
            return
        if data or exchange.is_over or exchange.has_left:
            self._first.set_result(data)
        elif self._is_comment_due:
            self._is_comment_due = False
            self._first.set_result(self._comment())
        elif exchange.has_more:
            exchange.wake()

    def _resume(self) -> None:
        self._blocked_since = None
        self._pump()

    def _comment(self) -> bytes:
        """A line that every SSE client skips. Without the blank line, which would end an event."""
        position = self.exchange.queue_position
        if position is None:
            return b": waiting\n"
        return b": queue position=%d wait_s=%.1f\n" % position

    def look(self, now: float) -> None:
        connection = self._connection
        if connection is not None and connection.is_write_paused:
            if self._blocked_since is None:
                self._blocked_since = now
            elif now - self._blocked_since > self._pace.stall_s:
                self.exchange.leave()
                connection.abort()
        elif self._has_written:
            self._has_written = False
            self._quiet_since = now
        elif now - self._quiet_since > (self._pace.first_comment_s if connection is None else self._pace.comment_s):
            self._quiet_since = now
            self._is_comment_due = True
            self.exchange.wake()

    def _break_off(self, connection: ClientConnection, error: ArgosyError) -> None:
        """Send the error, then end the connection in a way that no client takes for success."""
        CLIENT.debug("stream of request %s fails: %s", self.exchange.request.id, error.error_code)
        self.exchange.meter.on_broken(error)
        connection.write_piece(b"data: " + error_json(error) + b"\n\n")
        connection.break_off()


def _nothing() -> None:
    pass
