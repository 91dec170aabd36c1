"""The outermost layer: a request id and a processing time on every reply, responses counted."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.gateway.faults import error_response
from serving.metrics.page import Metrics

logger = logging.getLogger("argosy.gateway")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
OTHER = "other"
"""Route label of paths that no route knows."""


class Envelope:
    """Pure ASGI: it touches the first message of a response and hands the others on."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, draw_id: Callable[[], str], monotonic: Callable[[], float]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._draw_id = draw_id
        self._monotonic = monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = self._monotonic()
        request_id = _given_id(scope) or self._draw_id().encode()

        scope.setdefault("extensions", {})["argosy.request_id"] = request_id.decode()
        logs.REQUEST_ID.set(request_id.decode())
        is_started = False

        async def send_first(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                elapsed_ms = max(int(1000 * (self._monotonic() - arrived)), 0)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id),
                    (b"openai-processing-ms", b"%d" % elapsed_ms),
                ]
                route = getattr(scope.get("route"), "path", OTHER)
                self._metrics.count_response(route, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_first)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as failure:
            if is_started:
                raise  # the server cuts the connection
            logger.exception("unexpected failure")
            await error_response(failure, Request(scope), self._metrics)(scope, receive, send_first)


def _given_id(scope: Scope) -> bytes | None:
    """The client's own x-request-id, if it is harmless in logs and headers."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: bytes = value
            return given if _REQUEST_ID.fullmatch(given) else None
    return None
