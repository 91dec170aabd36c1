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
        return JSONResponse({"object": "list", "data": [_model(card) for card in gateway.dispatch.cards()]})

    @routes.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        """One served model; names may contain slashes."""
        card = gateway.dispatch.card(model)
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
