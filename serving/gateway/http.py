"""uvicorn's HTTP protocol with the bounds that it lacks (C24).

Header bytes and count, URL length, body size and the time a client may take to send them are
checked as bytes arrive, before they are collected. A refusal is an error in OpenAI's shape and ends
the connection: what is still on its way is read and dropped for a moment, so that the client sees
the answer and not a reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.errors import (
    ArgosyError,
    HeadersTooLarge,
    MalformedRequest,
    PayloadTooLarge,
    RequestTimeout,
    UrlTooLong,
)
from serving.gateway.faults import error_json

MAX_HEADER_BYTES = 16 << 10
MAX_HEADERS = 100
MAX_URL_BYTES = 8 << 10
MAX_PIPELINED = 8
MAX_CONNECTIONS = 16384
HEADER_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 30.0
LINGER_S = 1.0  # how long a refused client may go on sending into the void
LAST_WORDS_S = 0.1  # between a stream's error and the end of its connection
FLUSH_S = 60.0  # how long a client may take to read a reply that is complete
UNSENT_BYTES = 48 << 10  # writing pauses above this; one rendered piece may follow it
_TCP_NOTSENT_LOWAT = 25


class BoundedProtocol(HttpToolsProtocol):
    """One client connection. In every scope, `extensions["argosy.connection"]` is this object."""

    max_body_bytes: ClassVar[int] = 2 << 20
    header_timeout_s: ClassVar[float] = HEADER_TIMEOUT_S
    body_timeout_s: ClassVar[float] = BODY_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._head_bytes = 0  # received since the last complete message, at least
        self._header_bytes = 0
        self._body_bytes = 0
        self._refusal: ArgosyError | None = None
        self._is_refused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._cycles: deque[RequestResponseCycle] = deque()
        self._framing = b""  # the header that delimits the body of the request under way, if it has one
        self._is_reframing = False
        self.on_writable: Callable[[], None] = lambda: None
        self.is_write_paused = False  # whether more than UNSENT_BYTES wait for the client

    # --- connection -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=UNSENT_BYTES, low=UNSENT_BYTES // 4)
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # What the kernel has not sent counts as unsent too; its own limit may be megabytes.
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._expect(self.header_timeout_s, "headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_deadline()
        for cycle in self._cycles:
            # uvicorn tells only the newest; a pipelining client has several
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    @property
    def is_closing(self) -> bool:
        """Whether the client has gone, or is being sent away."""
        return self.transport.is_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_write_paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.is_write_paused = False
        self.on_writable()

    def write_piece(self, data: bytes) -> None:
        """One chunk of the response under way, past ASGI: for replies that send thousands."""
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def abort(self) -> None:
        """Close now; what is unsent is lost, in the kernel's buffer as well."""
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):  # closed already, or no socket
            cast(socket.socket, sock).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def break_off(self) -> None:
        """Send what is unsent, then close without the end of the body."""
        for cycle in self._cycles:
            cycle.disconnected = True  # its handler has said all that it had to say
            cycle.message_event.set()
        # A browser whose body breaks drops what its page has not read yet: that would be the error itself.
        self.loop.call_later(LAST_WORDS_S, self._close)

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection closes; one that still has to read its reply gets the time for it."""
        self._close()

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._close()
        else:
            super().shutdown()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self._abort_later(FLUSH_S)
            self.transport.close()

    # --- bytes ------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        rest = data
        while rest:
            piece, rest = rest, b""
            if self._is_in_head:
                if self._deadline is None:
                    self._expect(self.header_timeout_s, "headers")
                # never feed more of a head than the limit: the parser collects whole fields
                allowance = MAX_HEADER_BYTES + MAX_URL_BYTES - self._head_bytes
                if allowance <= 0:
                    message = f"The request's head exceeds {MAX_HEADER_BYTES} bytes of headers."
                    self._refuse(HeadersTooLarge(message))
                    return
                piece, rest = piece[:allowance], piece[allowance:]
                self._head_bytes += len(piece)
            try:
                self._unset_keepalive_if_required()
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                rest = piece[upgrade.args[0] :] + rest
                self._decline_upgrade()
            except httptools.HttpParserError:
                self._refuse(self._refusal or MalformedRequest("The request is not valid HTTP/1.1."))
                return
            if self._is_refused or self.transport.is_closing():
                return

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest(msg))

    # --- parser callbacks; what they raise ends in data_received ----------------------------------

    def on_message_begin(self) -> None:
        if self._is_reframing:
            return
        self._is_in_head = True
        self._header_bytes = 0
        self._body_bytes = 0
        self._expect(self.header_timeout_s, "headers")
        super().on_message_begin()
        cast(dict[str, Any], self.scope)["extensions"] = {"argosy.connection": self}

    def on_url(self, url: bytes) -> None:
        if self._is_reframing:
            return
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._fail(UrlTooLong(f"The URL exceeds {MAX_URL_BYTES} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_reframing:
            return
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > MAX_HEADER_BYTES:
            self._fail(HeadersTooLarge(f"The request's headers exceed {MAX_HEADER_BYTES} bytes."))
        if len(self.headers) >= MAX_HEADERS:
            self._fail(HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_reframing:
            return
        lengths = [value for name, value in self.headers if name == b"content-length"]
        encodings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if len(lengths) + len(encodings) > 1:
            self._fail(MalformedRequest("The request has more than one of Content-Length and Transfer-Encoding."))
        if encodings and encodings[0].strip().lower() != b"chunked":
            self._fail(MalformedRequest("The request's Transfer-Encoding must be chunked, and nothing else."))
        self._framing = b"transfer-encoding: chunked" if encodings else b""
        if lengths and int(lengths[0]) > 0:
            self._framing = b"content-length: " + lengths[0]
        if lengths and int(lengths[0]) > self.max_body_bytes:
            given = lengths[0][:20].decode("ascii", "replace")
            message = f"The request body of {given} bytes exceeds the limit of {self.max_body_bytes} bytes."
            self._fail(PayloadTooLarge(message))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(MalformedRequest(f"More than {MAX_PIPELINED} requests were pipelined."))
        self._is_in_head = False
        self._head_bytes = 0
        self._expect(self.body_timeout_s, "body")
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self.max_body_bytes:
            self._fail(PayloadTooLarge(f"The request body exceeds the limit of {self.max_body_bytes} bytes."))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing:
            return  # to the parser such a request ends with its head
        self._is_in_head = True
        self._unset_deadline()
        super().on_message_complete()

    def _decline_upgrade(self) -> None:
        """Go on in HTTP/1.1 after a request that offered another protocol (h2c: curl --http2, Java's client).

        The parser takes what follows the head for the new protocol's; a body is read by a second one,
        which is told of nothing but its length.
        """
        if not self._framing:
            return
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._is_reframing = True
        parser.feed_data(b"POST / HTTP/1.1\r\n" + self._framing + b"\r\n\r\n")
        self._is_reframing = False
        self.parser = parser

    # --- refusals ---------------------------------------------------------------------------------

    @staticmethod
    def note_refusal(error: ArgosyError) -> str:
        """Hears of every refusal; returns the request id that it is answered with."""
        return ""

    def _fail(self, error: ArgosyError) -> None:
        """End parsing from within a callback."""
        self._refusal = error
        raise error

    def _refuse(self, error: ArgosyError) -> None:
        """Answer, unless an answer is under way, and end the connection."""
        self._is_refused = True
        self._unset_deadline()
        is_answering = any(cycle.response_started and not cycle.response_complete for cycle in self._cycles)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True  # its handler learns that nobody listens any more
                cycle.message_event.set()
        if self.transport.is_closing():
            return
        if is_answering:
            self.transport.close()
            return
        body = error_json(error)
        reason = {408: b"Request Timeout", 413: b"Content Too Large", 414: b"URI Too Long"}.get(
            error.status, b"Refused"
        )
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
        request_id = self.note_refusal(error)
        if request_id:
            head += b"x-request-id: " + request_id.encode() + b"\r\n"
        self.transport.write(head % (error.status, reason, len(body)) + b"\r\n" + body)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._abort_later(LINGER_S)
        else:
            self.transport.close()

    def _expect(self, timeout_s: float, what: str) -> None:
        """Refuse unless `what` is complete in time."""
        self._unset_deadline()
        self._deadline = self.loop.call_later(timeout_s, self._late, what, timeout_s)

    def _late(self, what: str, timeout_s: float) -> None:
        if self._is_in_head and self._head_bytes == 0:
            self.break_off()  # nothing was asked: nothing is answered
        else:
            self._refuse(RequestTimeout(f"The request's {what} did not arrive within {timeout_s:g} s."))

    def _abort_later(self, delay_s: float) -> None:
        self._unset_deadline()
        self._deadline = self.loop.call_later(delay_s, self.abort)

    def _unset_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded_protocol(
    max_body_bytes: int, note_refusal: Callable[[ArgosyError], str] | None = None
) -> type[BoundedProtocol]:
    """The protocol class with its body limit, as uvicorn's `http` setting takes it.

    note_refusal: hears of every request refused here, which no handler sees; returns its request id.
    """
    members: dict[str, Any] = {"max_body_bytes": max_body_bytes}
    if note_refusal is not None:
        members["note_refusal"] = staticmethod(note_refusal)
    return type("BoundedProtocol", (BoundedProtocol,), members)
