"""Reading a request's body: bounded as it arrives, decoded by our own rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request

from serving.errors import PayloadTooLarge, UnsupportedMediaType
from serving.gateway.strict_json import decode


async def read_json(request: Request, max_bytes: int, hold: Callable[[int], None]) -> Any:
    """The decoded JSON body.

    hold: hears how many bytes have arrived, before they are kept.
    Raises UnsupportedMediaType for a compressed body, PayloadTooLarge above max_bytes, InvalidJson,
    ClientDisconnect when the client leaves before its body is complete, and whatever `hold` raises.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:32]!r} is not accepted; send the body uncompressed.")
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLarge(f"The request body exceeds the limit of {max_bytes} bytes.")
        hold(len(chunk))
        chunks.append(chunk)
        if not message.get("more_body", False):
            return decode(b"".join(chunks))
