"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from serving.gateway.api.generation import encode, generate, prompt_ids
from serving.gateway.bodies import ChatBody, Generation, parse_chat
from serving.gateway.fields import Limits
from serving.gateway.gateway import Gateway
from serving.gateway.language import Language, Tokens
from serving.gateway.logprobs import TokenNames, chat_logprobs
from serving.gateway.rendering import EventShape, Extras, WholeRendering
from serving.gateway.streams import Choice, Request
from serving.gateway.usage import usage_json


class ChatFormat:
    """Bodies and replies of the chat endpoint."""

    id_prefix = "chatcmpl"
    prompt_param = "messages"

    def parse(self, body: Any, limits: Limits, is_lenient: bool) -> ChatBody:
        return parse_chat(body, limits, is_lenient)

    async def encode(self, body: ChatBody, language: Language) -> list[Tokens]:
        return [await language.encode_chat(body)]

    def extras(self, choice: Choice, generation: Generation, names: TokenNames) -> Extras:
        num_prompt = len(choice.prompt_ids) // 4
        return Extras(
            (lambda entries: chat_logprobs(entries, names)) if generation.num_logprobs is not None else None,
            generation.return_token_ids,
            (lambda num_tokens: usage_json(num_prompt, num_tokens)) if generation.continuous_usage else None,
        )

    def shape(self, choice: Choice, generation: Generation) -> EventShape:
        head = encode(_envelope(choice.request, "chat.completion.chunk"))[:-1]
        head += b',"choices":[{"index":%d,"delta":' % choice.index
        tail = b'],"system_fingerprint":' + encode(choice.request.card.fingerprint)
        role = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        if generation.return_token_ids:
            role += b',"prompt_token_ids":' + encode(prompt_ids(choice))
        return EventShape(
            head=head,
            text_open=b'{"content":',
            text_close=b"}",
            no_text=b"{}",
            tail=tail,
            prelude=b"data: " + head + role + b"}" + tail + b"}\n\n",
            has_stop_reason=False,
        )

    def final_events(self, request: Request, usage: dict[str, Any] | None) -> bytes:
        if usage is None:
            return b""
        document = _envelope(request, "chat.completion.chunk") | {
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
            _envelope(request, "chat.completion")
            | {
                "choices": choices,
                "system_fingerprint": request.card.fingerprint,
                "service_tier": None,
                "usage": usage,
            }
        )

    def _choice(self, rendering: WholeRendering, generation: Generation) -> dict[str, Any]:
        continuation = rendering.continuation
        item = {
            "index": rendering.choice.index,
            "message": {"role": "assistant", "content": rendering.text, "refusal": None},
            "logprobs": rendering.logprobs,
            "finish_reason": continuation.finish_reason,
            "stop_reason": continuation.stop_reason,
        }
        if generation.return_token_ids:
            item["token_ids"] = rendering.token_ids
            item["prompt_token_ids"] = prompt_ids(rendering.choice)
        return item


def _envelope(request: Request, kind: str) -> dict[str, Any]:
    return {"id": request.id, "object": kind, "created": request.created, "model": request.card.model}


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter()
    form = ChatFormat()

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: HttpRequest) -> Response:
        """Answer a conversation."""
        return await generate(gateway, request, form)

    return routes
