"""The small world of the API's tests: a real server on a loopback socket, a scripted data plane."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvloop
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from serving.config import GatewaySettings
from serving.errors import ArgosyError
from serving.gateway.app import build_app
from serving.gateway.clock import Clock, Ids
from serving.gateway.demand import Demand
from serving.gateway.gateway import Gateway
from serving.gateway.http import BoundedProtocol
from serving.gateway.language import Language
from serving.gateway.reply import Pace
from serving.gateway.server import GatewayServer, make_server
from serving.gateway.streams import Choice, Request
from serving.gateway.text.chat_template import ChatTemplate
from serving.gateway.text.tokenizer import Tokenizer, max_prompt_bytes
from serving.metrics.snapshot import PlaneView
from serving.types import NO_LOGPROBS, FinishReason, ModelCard

MODEL = "tiny"
CONTEXT = 512
CREATED = 1_700_000_000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_json() -> bytes:
    """Byte-level BPE: 256 bytes, a few merges, three special tokens. Ids below 256 are bytes."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(characters)}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    return raw.to_str().encode()


ASSETS = {
    "tokenizer.json": tokenizer_json(),
    "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}).encode(),
}
TOKENIZER = Tokenizer.from_assets(ASSETS, max_prompt_bytes=max_prompt_bytes(CONTEXT))
END_OF_TEXT, IM_START, IM_END = (TOKENIZER.token_id(name) or 0 for name in SPECIAL)

CARD = ModelCard(
    fingerprint="f00d",
    model=MODEL,
    max_model_len=CONTEXT,
    max_num_seqs=8,
    logits_size=TOKENIZER.size,
    tokenizer_size=TOKENIZER.size,
    eos_ids=(IM_END,),
    bos_id=None,
    block_size=16,
    determinism="exact",
    assets={},
    created=1_600_000_000,
)
LANGUAGE = Language(CARD, TOKENIZER, ChatTemplate.from_assets(ASSETS, TOKENIZER))


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def packed_logprob(token_id: int, alternatives: int) -> bytes:
    """A made-up entry: the sampled token first, then its neighbours."""
    pairs: list[float] = []
    for rank in range(alternatives):
        pairs += [(token_id + rank) % TOKENIZER.size, -0.5 - rank]
    return struct.pack(f"<f{'If' * alternatives}", -0.5, *pairs)


@dataclasses.dataclass
class Script:
    """What the data plane does with every choice."""

    text: str = "hello world"
    ids: list[int] | None = None  # instead of text
    frames: tuple[int, ...] = (1,)  # tokens per frame, repeated
    gap_s: float = 0.0  # between frames
    queue_s: float = 0.0  # before the first
    fail_after: int | None = None  # tokens
    failure: ArgosyError | None = None
    lacks_end: bool = False  # the engine never says that the row is over
    cached_tokens: int = 0
    num_resumes: int = 0

    def output_ids(self, choice: Choice) -> list[int]:
        """Tokens of the choice, ended as an engine would."""
        ids = (ids_of(self.text) if self.ids is None else self.ids) + [IM_END]
        sampling = choice.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {IM_END})
        if sampling.ignore_eos and IM_END not in sampling.stop_token_ids:
            ids = ids[:-1] * (sampling.max_tokens // max(len(ids) - 1, 1) + 1)
        for at, token_id in enumerate(ids):
            if token_id in stops:
                ids = ids[: at + 1]
                break
        return ids[: sampling.max_tokens]


class ScriptedPlane:
    """A data plane without engines. Everything that it was told is in public lists."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.cards_now: list[ModelCard] = [CARD]
        self.submitted: list[Request] = []
        self.cancelled: list[tuple[float, Choice]] = []
        self.refusal: ArgosyError | None = None
        self.ready: tuple[bool, str] = (True, "")
        self.queued: dict[Request, tuple[int, float]] = {}
        self.demand = Demand(GatewaySettings(fd=-1))
        self._tasks: dict[Choice, asyncio.Task[None]] = {}

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def card(self, model: str) -> ModelCard | None:
        return next((card for card in self.cards_now if card.model == model), None)

    def cards(self) -> list[ModelCard]:
        return self.cards_now

    async def asset(self, card: ModelCard, name: str) -> Path:
        raise FileNotFoundError(name)

    def progress(self) -> list[dict[str, Any]]:
        return [{"id": "replica-0", "state": "ready", "epoch": 1, "ranks": []}]

    def view(self) -> PlaneView:
        return PlaneView()

    def is_ready(self) -> tuple[bool, str]:
        return self.ready

    def queue_position(self, request: Request) -> tuple[int, float] | None:
        return self.queued.get(request)

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request)
        if self.script.queue_s:
            self.queued[request] = (3, 1.25)
        for choice in request.choices:
            self._tasks[choice] = asyncio.create_task(self._run(choice))

    def cancel(self, choice: Choice) -> None:
        self.cancelled.append((time.monotonic(), choice))
        self._tasks[choice].cancel()

    @property
    def num_running(self) -> int:
        return sum(not task.done() for task in self._tasks.values())

    async def _run(self, choice: Choice) -> None:
        script, request = self.script, choice.request
        await asyncio.sleep(script.queue_s)
        self.queued.pop(request, None)
        choice.cached_tokens = script.cached_tokens
        choice.num_resumes = script.num_resumes
        ids = script.output_ids(choice)
        at = frame = 0
        while at < len(ids):
            if script.fail_after is not None and at >= script.fail_after:
                choice.error = script.failure
                request.on_progress(choice)
                return
            size = script.frames[frame % len(script.frames)]
            piece = ids[at : at + size]
            choice.output_ids.extend(piece)
            if choice.sampling.logprobs != NO_LOGPROBS:
                choice.logprobs += [packed_logprob(token_id, choice.sampling.logprobs) for token_id in piece]
            at += size
            frame += 1
            if at >= len(ids) and not script.lacks_end:
                is_stop = ids[-1] == IM_END or ids[-1] in choice.sampling.stop_token_ids
                choice.finish = FinishReason.STOP if is_stop else FinishReason.LENGTH
            request.on_progress(choice)
            await asyncio.sleep(script.gap_s)


class World:
    """A gateway that serves, and clients for it."""

    def __init__(
        self, plane: ScriptedPlane, settings: GatewaySettings, pace: Pace, timeouts_s: tuple[float, float]
    ) -> None:
        """timeouts_s: for a request's head and body."""
        self.plane = plane
        self._settings = settings
        self._pace = pace
        self._timeouts_s = timeouts_s
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.loop: asyncio.AbstractEventLoop
        self.server: GatewayServer
        self.gateway: Gateway
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        async def serve() -> None:
            numbers = iter(range(1, 1 << 62))

            async def load(card: ModelCard) -> Language:
                return LANGUAGE

            app = build_app(
                self._settings,
                self.plane,
                clock=Clock(wall=lambda: CREATED + time.monotonic() * 0, monotonic=time.monotonic),
                ids=Ids("gateway-0", lambda bits: next(numbers)),
                load_language=load,
                pace=self._pace,
            )
            self.gateway = app.state.gateway
            self.gateway.created = lambda: CREATED
            self.gateway.languages.close = lambda: None  # type: ignore[method-assign]
            self.server = make_server(app, self._settings)
            bounded: type[BoundedProtocol] = self.server.config.http  # type: ignore[assignment]
            bounded.header_timeout_s, bounded.body_timeout_s = self._timeouts_s
            self.loop = asyncio.get_running_loop()
            serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
            while not self.server.started and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            self._ready.set()
            await serving

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def on_loop(self, call: Callable[[], Any]) -> Any:
        """Result of a call made in the server's event loop."""

        async def run() -> Any:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)

    # --- clients ----------------------------------------------------------------------------------

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="sk-unused", max_retries=0)

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="sk-unused", max_retries=0)

    def post(self, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str) -> httpx.Response:
        content = json.dumps(body).encode() if raw is None else raw
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + path, content=content, headers={"content-type": "application/json"} | given)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": "hi"} | body)

    def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages} | body)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path)


@contextlib.contextmanager
def a_world(
    script: Script | None = None,
    *,
    pace: Pace | None = None,
    header_timeout_s: float = 10.0,
    body_timeout_s: float = 30.0,
    **settings: Any,
) -> Iterator[World]:
    """A running gateway; it ends with the block, and every task with it."""
    asked = GatewaySettings(fd=-1, served_model_name=MODEL, secret="00" * 32, **settings)
    world = World(ScriptedPlane(script or Script()), asked, pace or Pace(), (header_timeout_s, body_timeout_s))
    world.start()
    try:
        yield world
    finally:
        world.stop()


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Waits for a condition; the time it took, in seconds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it did not happen"
        time.sleep(0.002)
    return time.monotonic() - begun


def payloads(text: str) -> list[Any]:
    """Data of the events of an SSE body, decoded; "[DONE]" stays text."""
    found = []
    for line in text.split("\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
