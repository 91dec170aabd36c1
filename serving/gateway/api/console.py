"""GET /console: the operator's page. Its files hold no data; the data beside it is for operators only."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from serving.errors import NotFound
from serving.gateway.gateway import Gateway
from serving.metrics.histogram import LAG_SECONDS, RATIOS, SECONDS, STEP_SECONDS, Histogram
from serving.metrics.labels import MAX_RANKS, MAX_REPLICAS
from serving.metrics.series import ModelSeries
from serving.metrics.snapshot import ReplicaView, Snapshot
from serving.types import ModelCard

FOLDER = Path(__file__).parent.parent / "console"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Nothing from elsewhere, nothing inline, no text that becomes HTML.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, and answered by 304
}

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file of the page, read once."""

    body: bytes
    media_type: str
    etag: str


def files() -> dict[str, File]:
    """By name. A path that a client sends is looked up here and never reaches the file system."""
    return {
        path.name: File(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        for path in sorted(FOLDER.iterdir())
        if path.suffix in MEDIA_TYPES
        for body in [path.read_bytes()]
    }


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    table = files()
    version = importlib.metadata.version("argosy")
    began = gateway.clock.monotonic()

    def send(file: File, request: Request) -> Response:
        headers = HEADERS | {"etag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers, media_type=file.media_type)

    @routes.get("/console")
    async def page(request: Request) -> Response:
        """The page itself, for anyone."""
        return send(table[PAGE], request)

    @routes.get("/console/")
    async def page_with_slash() -> Response:
        """Its links are relative to a path without the slash."""
        return RedirectResponse("../console")

    @routes.get("/console/state")
    async def state(request: Request) -> Response:
        """Fleet and counts at this moment, for operators: what the page asks for once per second."""
        gateway.operators.check(request)
        document = {"now": gateway.clock.monotonic(), "version": version} | _state(gateway, began)
        return Response(_encode(document), headers={"cache-control": "no-store"}, media_type="application/json")

    @routes.get("/console/{name}")
    async def file(name: str, request: Request) -> Response:
        """A style sheet, a script, a picture."""
        if name not in table or name == PAGE:
            raise NotFound(f"The console has no file {name[:64]!r}.")
        return send(table[name], request)

    return routes


def _state(gateway: Gateway, began: float) -> dict[str, Any]:
    """Counts are since the start of whoever counts; a reader takes differences.

    Bounded by the bounds of /metrics: MAX_REPLICAS replicas (those in trouble first, when there are more),
    MAX_MODELS models, closed sets of codes.
    """
    snapshot = gateway.metrics.snapshot()
    is_ready, cause = gateway.dispatch.is_ready()
    replicas = gateway.dispatch.progress()
    shown = (
        sorted(replicas, key=lambda replica: replica["state"] == "ready") if len(replicas) > MAX_REPLICAS else replicas
    )
    views = {view.id: view for view in snapshot.plane.replicas}
    return {
        "object": "console.state",
        "gateway": {
            "name": gateway.settings.name,
            "uptime_s": gateway.clock.monotonic() - began,
            "is_ready": is_ready and not gateway.is_draining,
            "cause": "the gateway is shutting down" if gateway.is_draining else cause,
            "num_connections": snapshot.num_connections,
            "loop_lag": _histogram(snapshot.plane.loop_lag),
        },
        "num_replicas": len(replicas),
        "replicas": [_replica(replica, views) for replica in shown[:MAX_REPLICAS]],
        "models": _models(snapshot, gateway.dispatch.cards()),
        "responses": _by_status(snapshot.responses),
        "errors": snapshot.errors,
        "sheds": snapshot.sheds,
        "faults": snapshot.plane.faults,
        "links_ended": snapshot.plane.links_ended,
        "bounds": {"seconds": SECONDS, "step_seconds": STEP_SECONDS, "ratios": RATIOS, "loop_lag": LAG_SECONDS},
    }


def _replica(progress: dict[str, Any], views: Mapping[str, ReplicaView]) -> dict[str, Any]:
    entry = progress | {"ranks": progress["ranks"][:MAX_RANKS], "num_ranks": len(progress["ranks"])}
    view = views.get(progress["id"]) if progress["state"] != "down" else None
    if view is not None:
        entry |= {"model": view.model, "announced_s": view.beat.announced_s}
        entry["stats"] = None if view.stats is None else msgspec.structs.asdict(view.stats)
    return entry


def _models(snapshot: Snapshot, cards: list[ModelCard]) -> dict[str, Any]:
    by_name = {card.model: card for card in cards}
    return {
        name: _series(series)
        | dict(zip(("queued_choices", "queued_tokens"), snapshot.plane.queued.get(name, (0, 0)), strict=True))
        | {"card": _card(by_name.get(name))}
        for name, series in snapshot.models.items()
    }


def _series(series: ModelSeries) -> dict[str, Any]:
    """Every count of it; histograms as {counts, sum}."""
    values = ((field.name, getattr(series, field.name)) for field in dataclasses.fields(series))
    return {name: _histogram(value) if isinstance(value, Histogram) else value for name, value in values}


def _card(card: ModelCard | None) -> dict[str, Any] | None:
    if card is None:
        return None
    names = ("fingerprint", "max_model_len", "max_num_seqs", "block_size", "determinism", "dtype")
    return {name: getattr(card, name) for name in names}


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"counts": histogram.counts, "sum": histogram.sum}


def _by_status(responses: Mapping[tuple[str, str], int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for (_, status), count in responses.items():
        totals[status] = totals.get(status, 0) + count
    return totals
