"""GET /v1/models: what is served here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from serving.errors import ModelNotFound
from serving.gateway.gateway import Gateway
from serving.types import ModelCard


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models() -> Response:
        """The served models, those whose replicas are all down included."""
        models = [_model(card) for card in gateway.dispatch.cards()]
        if not models and gateway.settings.can_wake:
            models.append(_asleep(gateway.settings.served_model_name))
        return JSONResponse({"object": "list", "data": models})

    @routes.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        """One served model; names may contain slashes."""
        card = gateway.dispatch.card(model)
        settings = gateway.settings
        if card is None and settings.can_wake and model == settings.served_model_name:
            return JSONResponse(_asleep(model))
        if card is None:
            raise ModelNotFound(f"The model {model[:64]!r} does not exist.", param="model")
        return JSONResponse(_model(card))

    return routes


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model,
        "object": "model",
        "created": card.created,
        "owned_by": "argosy",
        "root": card.model,
        "parent": None,
        "max_model_len": card.max_model_len,
    }


def _asleep(model: str) -> dict[str, Any]:
    """A model of which this gateway has never seen a replica, and whose first request starts one."""
    return {
        "id": model,
        "object": "model",
        "created": 0,
        "owned_by": "argosy",
        "root": model,
        "parent": None,
        "max_model_len": None,
    }
