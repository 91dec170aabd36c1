"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from serving.gateway.api.generation import encode, generate, prompt_ids
from serving.gateway.bodies import CompletionBody, Generation, parse_completion
from serving.gateway.fields import Limits
from serving.gateway.gateway import Gateway
from serving.gateway.language import Language, Tokens
from serving.gateway.logprobs import TokenNames, completion_logprobs
from serving.gateway.rendering import EventShape, Extras, WholeRendering
from serving.gateway.streams import Choice, Request
from serving.gateway.usage import usage_json


class CompletionFormat:
    """Bodies and replies of the completion endpoint."""

    id_prefix = "cmpl"
    prompt_param = "prompt"

    def parse(self, body: Any, limits: Limits, is_lenient: bool) -> CompletionBody:
        return parse_completion(body, limits, is_lenient)

    async def encode(self, body: CompletionBody, language: Language) -> list[Tokens]:
        return await language.encode_prompts(body)

    def extras(self, choice: Choice, generation: Generation, names: TokenNames) -> Extras:
        num_prompt = len(choice.prompt_ids) // 4
        return Extras(
            (lambda entries: completion_logprobs(entries, names)) if generation.num_logprobs is not None else None,
            generation.return_token_ids,
            (lambda num_tokens: usage_json(num_prompt, num_tokens)) if generation.continuous_usage else None,
        )

    def shape(self, choice: Choice, generation: Generation) -> EventShape:
        extra = b',"prompt_token_ids":' + encode(prompt_ids(choice)) if generation.return_token_ids else b""
        return EventShape(
            head=_head(choice.request)[:-1] + b',"choices":[{"index":%d,"text":' % choice.index,
            text_open=b"",
            text_close=b"",
            no_text=b'""',
            tail=b'],"system_fingerprint":' + encode(choice.request.card.fingerprint),
            first_extra=extra,
        )

    def final_events(self, request: Request, usage: dict[str, Any] | None) -> bytes:
        if usage is None:
            return b""
        document = _envelope(request) | {
            "choices": [],
            "system_fingerprint": request.card.fingerprint,
            "usage": usage,
        }
        return b"data: " + encode(document) + b"\n\n"

    def document(
        self, request: Request, renderings: Sequence[WholeRendering], generation: Generation, usage: dict[str, Any]
    ) -> bytes:
        choices = [self._choice(rendering, generation) for rendering in renderings]
        return encode(
            _envelope(request) | {"choices": choices, "system_fingerprint": request.card.fingerprint, "usage": usage}
        )

    def _choice(self, rendering: WholeRendering, generation: Generation) -> dict[str, Any]:
        continuation = rendering.continuation
        item = {
            "index": rendering.choice.index,
            "text": rendering.text,
            "logprobs": rendering.logprobs,
            "finish_reason": continuation.finish_reason,
            "stop_reason": continuation.stop_reason,
        }
        if generation.return_token_ids:
            item["token_ids"] = rendering.token_ids
            item["prompt_token_ids"] = prompt_ids(rendering.choice)
        return item


def _envelope(request: Request) -> dict[str, Any]:
    return {
        "id": request.id,
        "object": "text_completion",
        "created": request.created,
        "model": request.card.model,
    }


def _head(request: Request) -> bytes:
    return encode(_envelope(request))


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter()
    form = CompletionFormat()

    @routes.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        """Continue one prompt or several."""
        return await generate(gateway, request, form)

    return routes
