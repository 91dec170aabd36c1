"""The gateway process: uvicorn on an inherited socket, and an end that takes a few seconds at most."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket

import uvicorn
import uvloop
from fastapi import FastAPI

from serving import logs
from serving.config import GatewaySettings
from serving.errors import ArgosyError, NoCapacity
from serving.gateway.app import build_app
from serving.gateway.dispatch import Dispatch
from serving.gateway.envelope import OTHER
from serving.gateway.gateway import Gateway
from serving.gateway.http import bounded_protocol
from serving.gateway.life import Life
from serving.gateway.request_log import RequestLog
from serving.gateway.tracing import Tracing

logger = logging.getLogger("argosy.gateway")

BACKLOG = 2048


class GatewayServer(uvicorn.Server):
    """Ends in three moves: accept nothing more, let what runs finish for a while, fail the rest."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_s: float) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_s = drain_s
        settings = gateway.settings
        self._log = RequestLog(settings.log_format, settings.slow_request_s)
        self.tracing: Tracing | None = None
        if settings.trace_endpoint:
            tracing = self.tracing = Tracing(settings.trace_endpoint, settings.trace_sample, settings.name)
            gateway.metrics.num_spans_dropped = lambda: tracing.num_dropped
        gateway.lives.sinks.append(self._tell)

    def _tell(self, life: Life) -> None:
        """A request is over."""
        self._log.on_end(life, "" if self.tracing is None else self.tracing.on_end(life))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._gateway.metrics.num_connections = lambda: len(self.server_state.connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.is_draining = True
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        give_up_at = asyncio.get_running_loop().time() + self._drain_s
        while self._gateway.replies and asyncio.get_running_loop().time() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for reply in list(self._gateway.replies):
            reply.exchange.fail(NoCapacity("The gateway is shutting down.", retry_after_s=1.0, reason="draining"))
        await super().shutdown(sockets)
        self._log.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


def make_server(app: FastAPI, settings: GatewaySettings) -> GatewayServer:
    """A server for the application, not yet running. Its `serve` takes the listening sockets."""
    gateway: Gateway = app.state.gateway

    def note_refusal(error: ArgosyError) -> str:
        gateway.metrics.count_response(OTHER, error.status)
        gateway.metrics.count_error(error)
        return gateway.ids.request("req")

    config = uvicorn.Config(
        app,
        http=bounded_protocol(settings.max_body_bytes, note_refusal),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    return GatewayServer(config, gateway, settings.drain_s)


def run(settings: GatewaySettings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    outlet = logs.set_up(
        settings.name,
        settings.log_format,
        is_patient=False,  # who logs here runs the streams
        has_messages=False,
        secrets=tuple(settings.secret.split(",")),
    )
    for name in ("uvicorn.error", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(logs.on_loop_failure)
        server = make_server(build_app(settings, Dispatch(settings)), settings)
        await server.serve(sockets=[socket.socket(fileno=settings.fd)])

    # uvicorn restores these handlers and raises the signal again after a graceful end: that is success
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    gc.freeze()  # modules live for ever: no collection need look at them
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
    outlet.close()
    return 0
