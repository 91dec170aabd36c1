"""A streamed reply: server-sent events, written at the client's pace.

Pure ASGI, because a token passes here: one wake-up renders every choice that has grown and makes
one write. Nothing is rendered while the client's buffer is full; the journal grows instead. A
stream that fails sends its error and breaks the connection: a clean end would read as success.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from serving.errors import ArgosyError, EngineError
from serving.gateway.exchange import Exchange
from serving.gateway.faults import error_json
from serving.gateway.reply import CLIENT, Pace, Reply

DONE = b"data: [DONE]\n\n"


class EventStream(Reply):
    """One client's stream of events."""

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
        self._pace = pace
        self._tail = tail
        self._time = asyncio.get_running_loop().time
        self._is_started = False
        self._is_comment_due = False
        self._written_at = self._time()
        self._blocked_since: float | None = None

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._stream(scope, send)
        except ArgosyError as error:
            if not self._is_started:
                raise
            await self._break_off(scope, error)
        except Exception:
            if self._is_started:
                await self._break_off(scope, EngineError("The server failed while it rendered this stream."))
            raise

    async def _stream(self, scope: Scope, send: Send) -> None:
        exchange = self.exchange
        write = scope.get("argosy.send", send)  # past the wrappers that only watch the first message
        while True:
            data = exchange.render()
            if exchange.is_over:
                data += self._tail() + DONE
            elif not data:
                if not self._is_comment_due:
                    await exchange.wait()
                    if exchange.has_left:
                        return
                    continue
                data = self._comment()
            if not self._is_started:
                self._is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._is_comment_due = False
            self._written_at = self._blocked_since = self._time()
            await write({"type": "http.response.body", "body": data, "more_body": not exchange.is_over})
            self._blocked_since = None
            if exchange.is_over or exchange.has_left:
                return

    def _comment(self) -> bytes:
        """A line that every SSE client skips. Without the blank line, which would end an event."""
        position = self.exchange.queue_position
        if position is None:
            return b": waiting\n"
        return b": queue position=%d wait_s=%.1f\n" % position

    def look(self, now: float) -> None:
        blocked_since = self._blocked_since
        if blocked_since is not None:
            if now - blocked_since > self._pace.stall_s:
                self.exchange.leave()
                if self.connection is not None:
                    self.connection.abort()
        elif now - self._written_at > (self._pace.comment_s if self._is_started else self._pace.first_comment_s):
            self._is_comment_due = True
            self.exchange.wake()

    async def _break_off(self, scope: Scope, error: ArgosyError) -> None:
        """Send the error, then end the connection in a way that no client takes for success."""
        write: Send = scope["argosy.send"]
        CLIENT.debug("stream of request %s fails: %s", self.exchange.request.id, error.error_code)
        event = b"data: " + error_json(error) + b"\n\n"
        await write({"type": "http.response.body", "body": event, "more_body": True})
        if self.connection is None:
            raise error  # the server then cuts the connection
        self.connection.break_off()
