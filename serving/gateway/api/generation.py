"""The way of a generation request, the same for both endpoints: read, check, tokenise, submit, reply.

An endpoint brings a `Format`: how its body is parsed and what its replies look like.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from serving.gateway.admission import make_request
from serving.gateway.api.body import read_json
from serving.gateway.bodies import ChatBody, CompletionBody, Generation
from serving.gateway.continuation import Continuation, Ending
from serving.gateway.exchange import Exchange
from serving.gateway.faults import as_error
from serving.gateway.fields import Limits
from serving.gateway.gateway import Gateway
from serving.gateway.language import Language, Tokens
from serving.gateway.life import Life
from serving.gateway.logprobs import TokenNames
from serving.gateway.rendering import EventRendering, EventShape, Extras, Rendering, WholeRendering
from serving.gateway.reply import ClientConnection, WholeReply
from serving.gateway.schema import model_name
from serving.gateway.sse import EventStream
from serving.gateway.streams import Choice, Request
from serving.gateway.text.stop import StopMatcher, StopSet
from serving.gateway.tracing import caller_of
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
    life = Life(
        request_id=http.scope["extensions"]["argosy.request_id"],
        endpoint=http.scope["route"].path,
        arrived=arrived,
        arrived_wall=gateway.clock.wall(),
        trace=caller_of(http.headers),
    )
    gateway.lives.begin(life)
    try:
        return await _reply(gateway, http, form, life)
    except BaseException as failure:
        has_left = isinstance(failure, ClientDisconnect)
        life.end(time.monotonic(), None if has_left else as_error(failure), has_left=has_left)
        raise


async def _reply(gateway: Gateway, http: HttpRequest, form: Format, life: Life) -> Response:
    is_lenient = http.headers.get("x-argosy-lenient") == "1"
    client: ClientConnection = http.scope["extensions"]["argosy.connection"]
    with gateway.admission.holding() as hold:
        raw = await read_json(http, gateway.settings.max_body_bytes, hold)
        life.did("read", life.arrived, time.monotonic())
        with gateway.admission.preparing():
            begun = time.monotonic()
            card = await gateway.card(model_name(raw), lambda: not client.is_closing)
            life.did("model", begun, time.monotonic())  # takes time only until a replica has been seen
            body = form.parse(raw, Limits(card.tokenizer_size, card.max_model_len), is_lenient)
            del raw
            begun = time.monotonic()
            language = await gateway.languages.of(card)
            loaded = time.monotonic()
            life.did("tokenizer", begun, loaded)  # and this until it has been loaded
            prompts = await form.encode(body, language)
            life.did("tokenised", loaded, time.monotonic(), tokens=sum(map(len, prompts)))
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
    _introduce(life, request, generation)
    gateway.lives.admitted(life)
    renderings = make_renderings(request, generation, form, language)
    meter = RequestMeter(gateway.metrics, card.model, life.arrived, request)
    exchange = Exchange(request, renderings, gateway.dispatch, meter, gateway.wakes, life)
    try:
        exchange.submit()
    except BaseException as error:
        exchange.close(False, as_error(error))
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


def _introduce(life: Life, request: Request, generation: Generation) -> None:
    """What is fixed at admission."""
    life.id = request.id
    life.model = request.card.model
    life.fingerprint = request.card.fingerprint
    life.is_stream = generation.stream
    life.n = generation.n
    life.priority = request.priority
    life.num_prompt_tokens = sum(len(choice.prompt_ids) // 4 for choice in request.choices[:: generation.n])
    life.choices = [choice.life for choice in request.choices]


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
