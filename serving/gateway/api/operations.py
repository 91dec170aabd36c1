"""What operators and machines ask: alive, ready, progressing, numbers, version. None of it queues."""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from serving.gateway.gateway import Gateway
from serving.gateway.schema import capabilities


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter()
    version = importlib.metadata.version("argosy")
    described = capabilities()

    @routes.get("/livez")
    async def livez() -> Response:
        """200 while this process answers at all."""
        return JSONResponse({"status": "ok"})

    @routes.get("/readyz")
    async def readyz() -> Response:
        """200 only when a completion sent now would be served; else 503 with the cause."""
        is_ready, cause = gateway.dispatch.is_ready()
        if gateway.is_draining:
            is_ready, cause = False, "the gateway is shutting down"
        if is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "cause": cause}, 503, headers={"retry-after": "1"})

    @routes.get("/health")
    async def health() -> Response:
        """`/readyz` without a body, for clients of other servers."""
        is_ready = gateway.dispatch.is_ready()[0] and not gateway.is_draining
        return Response(status_code=200) if is_ready else Response(status_code=503, headers={"retry-after": "1"})

    @routes.get("/progressz")
    async def progressz() -> Response:
        """Every replica that this gateway knows, with its ranks."""
        return JSONResponse({"replicas": gateway.dispatch.progress()})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version")
    async def get_version() -> Response:
        return JSONResponse({"version": version})

    @routes.get("/v1/capabilities")
    async def get_capabilities() -> Response:
        """Every parameter of the generation endpoints: honoured, inert or refused."""
        return JSONResponse(described)

    return routes
