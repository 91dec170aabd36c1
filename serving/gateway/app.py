"""The application: every route, the one error handler and the wiring, in one builder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from serving.config import GatewaySettings
from serving.errors import ArgosyError
from serving.gateway.admission import Admission
from serving.gateway.api import chat, completions, console, models, operations, requests
from serving.gateway.clock import Clock, Ids
from serving.gateway.envelope import Envelope
from serving.gateway.faults import error_response
from serving.gateway.gateway import DataPlane, Gateway
from serving.gateway.language import Language, Languages
from serving.gateway.operators import Operators
from serving.gateway.reply import Pace, look_after
from serving.gateway.tenants import Tenants
from serving.metrics.page import Metrics
from serving.types import ModelCard


def build_app(
    settings: GatewaySettings,
    dispatch: DataPlane,
    *,
    clock: Clock | None = None,
    ids: Ids | None = None,
    load_language: Callable[[ModelCard], Awaitable[Language]] | None = None,
    pace: Pace | None = None,
) -> FastAPI:
    """The gateway as an ASGI application; `app.state.gateway` is its Gateway.

    Its lifespan starts and closes `dispatch`. clock, ids, pace and load_language are injected
    by tests.
    """
    clock = clock or Clock()

    async def load(card: ModelCard) -> Language:
        return await Language.load(card, dispatch)

    gateway = Gateway(
        settings=settings,
        dispatch=dispatch,
        languages=Languages(load_language or load),
        clock=clock,
        ids=ids or Ids(settings.name),
        metrics=Metrics(),
        tenants=Tenants(settings.secret),
        admission=Admission(),
        operators=Operators(settings.operator_token_file),
        pace=pace or Pace(),
        created=clock.steady(),
    )

    gateway.metrics.plane = dispatch.view
    if settings.served_model_name:
        gateway.metrics.model(settings.served_model_name)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await dispatch.start()
        looking = asyncio.create_task(look_after(gateway.replies, gateway.pace))
        try:
            yield
        finally:
            looking.cancel()
            gateway.languages.close()
            await dispatch.close()

    async def answer(request: Request, raised: Exception) -> Response:
        return error_response(raised, request, gateway.metrics)

    app = FastAPI(
        title="Argosy",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI's own spans and logs would quote URLs and exceptions; ours are made in tracing.py.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        middleware=[
            Middleware(
                Envelope,
                metrics=gateway.metrics,
                draw_id=lambda: gateway.ids.request("req"),
                monotonic=clock.monotonic,
            )
        ],
        exception_handlers={ArgosyError: answer, HTTPException: answer, RequestValidationError: answer},
    )
    app.state.gateway = gateway
    for routes in (completions, chat, models, operations, requests, console):
        app.include_router(routes.router(gateway))
    return app
