"""The way of a generation request, the same for both endpoints: read, check, tokenise, submit, reply.

An endpoint brings a `Format`: how its body is parsed and what its replies look like.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from serving.gateway.admission import make_request
from serving.gateway.api.body import read_json
from serving.gateway.bodies import ChatBody, CompletionBody, Generation
from serving.gateway.continuation import Continuation, Ending
from serving.gateway.exchange import Exchange
from serving.gateway.fields import Limits
from serving.gateway.gateway import Gateway
from serving.gateway.language import Language, Tokens
from serving.gateway.logprobs import TokenNames
from serving.gateway.rendering import EventRendering, EventShape, Extras, Rendering, WholeRendering
from serving.gateway.reply import ClientConnection, WholeReply
from serving.gateway.schema import model_name
from serving.gateway.sse import EventStream
from serving.gateway.streams import Choice, Request
from serving.gateway.text.stop import StopMatcher, StopSet
from serving.gateway.usage import usage
from serving.metrics.meter import RequestMeter
from serving.wire import unpack_ids

encode = msgspec.json.Encoder().encode

_HEADER_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
MAX_IGNORED_CHARS = 1024


class Format(Protocol):
    """One endpoint's language: parsing and the shapes of its replies."""

    id_prefix: str
    prompt_param: str  # the parameter that a prompt too long is blamed on

    def parse(self, body: Any, limits: Limits, is_lenient: bool) -> CompletionBody | ChatBody: ...

    async def encode(self, body: Any, language: Language) -> list[Tokens]: ...

    def extras(self, choice: Choice, generation: Generation, names: TokenNames) -> Extras: ...

    def shape(self, choice: Choice, generation: Generation) -> EventShape: ...

    def final_events(self, request: Request, usage: dict[str, Any] | None) -> bytes: ...

    def document(
        self, request: Request, renderings: Sequence[WholeRendering], generation: Generation, usage: dict[str, Any]
    ) -> bytes: ...


async def generate(gateway: Gateway, http: HttpRequest, form: Format) -> Response:
    """Serve one generation request. Raises every ArgosyError that a client may cause or meet."""
    arrived = time.monotonic()
    is_lenient = http.headers.get("x-argosy-lenient") == "1"
    client: ClientConnection = http.scope["extensions"]["argosy.connection"]
    with gateway.admission.holding() as hold:
        raw = await read_json(http, gateway.settings.max_body_bytes, hold)
        with gateway.admission.preparing():
            card = await gateway.card(model_name(raw), lambda: not client.is_closing)
            body = form.parse(raw, Limits(card.tokenizer_size, card.max_model_len), is_lenient)
            del raw
            language = await gateway.languages.of(card)
            prompts = await form.encode(body, language)
    generation = body.generation
    tenant = gateway.tenants.of(http.headers.get("authorization"))
    request = make_request(
        request_id=gateway.ids.request(form.id_prefix),
        created=gateway.created(),
        card=card,
        deadline=gateway.clock.monotonic() + gateway.settings.request_timeout_s,
        generation=generation,
        prompts=prompts,
        param=form.prompt_param,
        salt=tenant.cache_salt(generation.cache_salt),
        draw_seed=gateway.ids.seed,
    )
    renderings = make_renderings(request, generation, form, language)
    meter = RequestMeter(gateway.metrics, card.model, arrived, request)
    exchange = Exchange(request, renderings, gateway.dispatch, meter, gateway.wakes)
    try:
        exchange.submit()
    except BaseException:
        exchange.close(False)
        raise
    headers = {"x-argosy-determinism": card.determinism}
    if generation.ignored:
        names = ",".join(_HEADER_UNSAFE.sub("_", name[:64]) for name in generation.ignored)
        headers["x-argosy-ignored"] = names[:MAX_IGNORED_CHARS]
    replies = gateway.replies
    if generation.stream:

        def tail() -> bytes:
            return form.final_events(request, usage(renderings, generation.n) if generation.include_usage else None)

        return EventStream(exchange, replies, headers, tail, gateway.pace)
    whole = [rendering for rendering in renderings if isinstance(rendering, WholeRendering)]

    def document() -> bytes:
        return form.document(request, whole, generation, usage(renderings, generation.n))

    return WholeReply(exchange, replies, headers, document)


def make_renderings(request: Request, generation: Generation, form: Format, language: Language) -> list[Rendering]:
    """One rendering per choice, nothing rendered yet."""
    tokenizer = language.tokenizer
    stops = StopSet(generation.stop) if generation.stop else None
    names = TokenNames(tokenizer.token_bytes, generation.tokens_as_ids)
    ending = None
    renderings: list[Rendering] = []
    for choice in request.choices:
        if ending is None or ending.max_tokens != choice.sampling.max_tokens:
            ending = Ending.of(request.card, choice.sampling)
        prime_ids = unpack_ids(choice.prompt_ids[-64:])
        detokenizer = tokenizer.detokenizer(prime_ids, skip_special_tokens=generation.skip_special_tokens)
        matcher = StopMatcher(stops, generation.include_stop) if stops is not None else None
        continuation = Continuation(ending, detokenizer, matcher)
        extras = form.extras(choice, generation, names)
        if generation.stream:
            renderings.append(EventRendering(choice, continuation, form.shape(choice, generation), extras))
        else:
            renderings.append(WholeRendering(choice, continuation, extras))
    return renderings


def prompt_ids(choice: Choice) -> list[int]:
    """The prompt as return_token_ids shows it."""
    return unpack_ids(choice.prompt_ids).tolist()
