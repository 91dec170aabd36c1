"""A client with nothing in it that could be late: blocking socket, one thread, a time per recv."""

from __future__ import annotations

import json
import socket
import time
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit


def stream(url: str, path: str, body: dict[str, Any]) -> tuple[float, list[float]]:
    """(TTFT, gaps) of a streamed completion, in seconds; an event per token is expected."""
    parts = urlsplit(url)
    data = json.dumps(body | {"stream": True}).encode()
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        start = time.monotonic()
        sock.sendall(head.encode() + data)
        times: list[float] = []
        seen = b""
        while b"data: [DONE]" not in seen:
            piece = sock.recv(65536)
            at = time.monotonic()
            assert piece, seen
            num_before = seen.count(b'"logprobs":{') if seen else 0
            seen += piece
            times += [at] * (seen.count(b'"logprobs":{') - num_before)
    return times[0] - start, [later - earlier for earlier, later in pairwise(times)]
