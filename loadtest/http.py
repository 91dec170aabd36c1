"""HTTP/1.1 over gevent sockets, with the time of every socket read.

locust's FastHttpUser reads bodies through a buffer and hands them on by length, so that a token's time would be that
of the buffer's filling. Here each `recv` is one piece with its own time. The parser is geventhttpclient's (llhttp);
connections are kept and used again, latest first.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import gevent.socket
import gevent.ssl
from geventhttpclient.response import HTTPParseError, HTTPResponse

from loadtest.failures import CONNECT, MALFORMED, RESET, TIMEOUT, RequestFailed

MAX_HEAD_BYTES = 64 << 10
RECV_BYTES = 64 << 10
MAX_IDLE_S = 4.0
"""Connections that lay longer are not used again: many servers close them after 5 s."""


class Target:
    """A base URL, taken apart. `http://host:8000` and `http://host:8000/v1` are the same."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for anything that is no http(s) URL."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"no http(s) URL: {url!r}")
        if parts.username or parts.query:
            raise ValueError(f"a target has neither user nor query: {url!r}")
        self.is_tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.is_tls else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        default = 443 if self.is_tls else 80
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = name if self.port == default else f"{name}:{self.port}"
        self.url = f"{parts.scheme}://{self.authority}{self.prefix}"


class Response:
    """A response being read. Times are time.monotonic() seconds."""

    def __init__(self, pool: Pool, sock: Any, has_served: bool) -> None:
        self._pool = pool
        self._sock = sock
        self._parser = HTTPResponse("POST")
        self.has_served = has_served
        self.sent_at = 0.0
        self.read_at = 0.0  # of the latest socket read
        self.headers_at = 0.0
        self.has_bytes = False
        self.is_over = False

    @property
    def status(self) -> int:
        return int(self._parser.status_code)

    def header(self, name: str) -> str:
        """A header's value, the first one; "" when there is none."""
        value = self._parser.get(name)
        return value[0] if isinstance(value, list) else value or ""

    def start(self) -> None:
        """Read until the headers are whole. Raises RequestFailed."""
        num_bytes = 0
        while not self._parser.headers_complete or self.status < 200:
            data = self._receive()
            if not data:
                raise RequestFailed(RESET, "the connection ended before the headers did")
            num_bytes += len(data)
            if num_bytes > MAX_HEAD_BYTES + RECV_BYTES:
                raise RequestFailed(MALFORMED, f"headers of more than {MAX_HEAD_BYTES} bytes")
        self.headers_at = self.read_at

    def read(self) -> tuple[bytes, float]:
        """The next piece of the body and the time of the read that brought it; b"" at the end. Raises RequestFailed."""
        parser = self._parser
        while True:
            if parser._body_buffer:
                piece = bytes(parser._body_buffer)
                parser._body_buffer.clear()
                return piece, self.read_at
            if parser.message_complete:
                self._finish()
                return b"", self.read_at
            if not self._receive():
                is_framed = self.header("content-length") or "chunked" in self.header("transfer-encoding").lower()
                if is_framed:
                    raise RequestFailed(RESET, "the connection ended within the body")
                parser.message_complete = True

    def _receive(self) -> bytes:
        try:
            data: bytes = self._sock.recv(RECV_BYTES)
            self.read_at = time.monotonic()
            if data:
                self.has_bytes = True
                self._parser.feed(data)
        except TimeoutError:
            raise RequestFailed(TIMEOUT, f"nothing came for {self._pool.timeout_s:g} s") from None
        except HTTPParseError as error:
            raise RequestFailed(MALFORMED, f"not HTTP: {error}") from None
        except OSError as error:
            raise RequestFailed(RESET, str(error)) from None
        return data

    def _finish(self) -> None:
        if not self.is_over:
            self.is_over = True
            if self._parser.should_close():
                self._sock.close()
            else:
                self._pool.give_back(self._sock)

    def close(self) -> None:
        """Give up what has not been read; the connection is not used again."""
        if not self.is_over:
            self.is_over = True
            self._sock.close()


class Pool:
    """Connections to one target."""

    def __init__(self, target: Target, *, connect_timeout_s: float = 10.0, timeout_s: float = 600.0) -> None:
        """timeout_s: longest wait for any next byte."""
        self.target = target
        self.connect_timeout_s = connect_timeout_s
        self.timeout_s = timeout_s
        self._idle: list[tuple[Any, float]] = []
        self._tls = ssl_context() if target.is_tls else None

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
        """Send a request and read its response's headers. Raises RequestFailed.

        A kept connection that ends before the first byte of a response was closed while it lay idle: the
        request then goes out again on a new one.
        """
        lines = [f"POST {self.target.prefix}{path} HTTP/1.1", f"Host: {self.target.authority}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        message = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
        while True:
            response = self._connection()
            try:
                self._send(response, message)
                response.start()
                return response
            except RequestFailed as failure:
                response.close()
                if not (response.has_served and not response.has_bytes and failure.failure == RESET):
                    raise
            except BaseException:
                response.close()
                raise

    def give_back(self, sock: Any) -> None:
        self._idle.append((sock, time.monotonic()))

    def close(self) -> None:
        for sock, _ in self._idle:
            sock.close()
        self._idle.clear()

    def _send(self, response: Response, message: bytes) -> None:
        try:
            response._sock.sendall(message)
        except TimeoutError:
            raise RequestFailed(TIMEOUT, f"the server took no bytes for {self.timeout_s:g} s") from None
        except OSError as error:
            raise RequestFailed(RESET, str(error)) from None
        response.sent_at = time.monotonic()

    def _connection(self) -> Response:
        while self._idle:
            sock, since = self._idle.pop()
            if time.monotonic() - since < MAX_IDLE_S and not _has_ended(sock):
                return Response(self, sock, has_served=True)
            sock.close()
        try:
            address = (self.target.host, self.target.port)
            sock = gevent.socket.create_connection(address, timeout=self.connect_timeout_s)
            sock.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self.target.host)
        except OSError as error:
            raise RequestFailed(CONNECT, str(error)) from None
        sock.settimeout(self.timeout_s)
        return Response(self, sock, has_served=False)


def ssl_context() -> Any:
    """Certificates are checked against the system's authorities."""
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context


def _has_ended(sock: Any) -> bool:
    """Whether an idle connection was closed by the server, or speaks out of turn."""
    if isinstance(sock, gevent.ssl.SSLSocket):
        return False  # cannot be peeked into; `post` notices
    timeout_s = sock.gettimeout()
    sock.settimeout(0)
    try:
        sock.recv(1, gevent.socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(timeout_s)
    return True
