"""GET /v1/requests: the lives of requests, for operators."""

from __future__ import annotations

from itertools import chain, islice

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from serving.errors import InvalidRequest, NotFound
from serving.gateway.account import account, entry
from serving.gateway.chrome import chrome_trace
from serving.gateway.gateway import Gateway

MAX_LIMIT = 500
STATES = ("running", "ended")
FORMATS = ("json", "chrome")


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter()
    lives = gateway.lives

    @routes.get("/v1/requests")
    async def list_requests(request: HttpRequest) -> Response:
        """Running requests and those that ended lately, newest first."""
        gateway.operators.check(request)
        state = _one_of(request, "state", STATES, "")
        limit = _limit(request)
        found = {"running": lives.running, "ended": lives.ended}
        chosen = found[state]() if state else chain(lives.running(), lives.ended())
        now = gateway.clock.monotonic()
        data = [entry(life, now) for life in islice(chosen, limit)]
        return JSONResponse({"object": "list", "data": data, "num_running": lives.num_running})

    @routes.get("/v1/requests/{name}")
    async def get_request(request: HttpRequest, name: str) -> Response:
        """One life, by the id of the reply's body or by its x-request-id."""
        gateway.operators.check(request)
        form = _one_of(request, "format", FORMATS, "json")
        life = lives.find(name)
        if life is None:
            raise NotFound(f"No request {name[:64]!r} is running here or has ended lately.", code="request_not_found")
        found = account(life, gateway.clock.monotonic())
        return JSONResponse(chrome_trace(found) if form == "chrome" else found)

    return routes


def _one_of(request: HttpRequest, name: str, allowed: tuple[str, ...], default: str) -> str:
    given = request.query_params.get(name, default)
    if given and given not in allowed:
        raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}; got {given[:64]!r}.", param=name)
    return given


def _limit(request: HttpRequest) -> int:
    given = request.query_params.get("limit", "50")
    if not (given.isascii() and given.isdigit() and len(given) <= 4 and 1 <= int(given) <= MAX_LIMIT):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_LIMIT}; got {given[:64]!r}.", param="limit")
    return int(given)
