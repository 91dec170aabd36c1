"""One request, from the call that a workload made to what was seen of its answer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from loadtest.failures import MALFORMED, STREAM_ERROR, TRUNCATED, RequestFailed, of_status
from loadtest.http import Pool, Response
from loadtest.record import Observation
from loadtest.sse import SseError, SseParser

MAX_BODY_BYTES = 64 << 20
"""Of a whole (not streamed) response."""
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request, ready to be sent: the body's bytes are fixed."""

    id: int
    endpoint: str
    body: bytes
    is_stream: bool = True
    label: str = ""
    tenant: str = ""
    session: int | None = None
    turn: int = 0
    wanted_prompt_tokens: int | None = None
    wanted_output_tokens: int | None = None
    body_seed: int | None = None
    is_verified: bool = False
    """To be sent again after the run, for comparison."""

    @property
    def hash(self) -> str:
        """blake2b-128 of all that makes up the request, but for the API key."""
        text = f"POST {PATHS[self.endpoint]}\n{self.tenant}\n".encode()
        return hashlib.blake2b(text + self.body, digest_size=16).hexdigest()

    @property
    def row(self) -> str:
        """Name of its rows in locust's tables."""
        name = f"{self.endpoint} {'stream' if self.is_stream else 'whole'}"
        return f"{name} [{self.label}]" if self.label else name


class Answer:
    """What has been seen of one request. Times are time.monotonic() seconds."""

    def __init__(self, call: Call, intended_at: float) -> None:
        self.call = call
        self.intended_at = intended_at
        self.started_at: float | None = None
        self.sent_at: float | None = None
        self.headers_at: float | None = None
        self.end_at: float | None = None
        self.token_times: list[float] = []
        self.first_token_at: float | None = None
        self.failure: RequestFailed | None = None
        self.status: int | None = None
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.server_id = ""
        self.fingerprint = ""
        self.num_comments = 0
        self.num_resumes = 0
        self.queue_position: int | None = None
        self.queue_wait_s: float | None = None
        self.text: list[str] = []
        self.logprobs: list[tuple[str, float | None]] = []

    def take(self, chunk: Chunk, at: float) -> None:
        """One event of a stream, or the whole body."""
        if chunk.error is not None:
            code, message = _error_words(chunk.error)
            raise RequestFailed(STREAM_ERROR, message, code)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.system_fingerprint:
            self.fingerprint = chunk.system_fingerprint
        has_output = False
        for choice in chunk.choices:
            part = choice.delta or choice.message
            if part is not None:
                text = part.content or part.reasoning_content or part.reasoning or ""
                has_output |= bool(part.tool_calls)
            else:
                text = choice.text or ""
            if text:
                self.text.append(text)
                has_output = True
            if choice.logprobs and choice.logprobs != _NULL:
                has_output = True
                if self.call.is_verified:
                    self.logprobs += _logprobs(choice.logprobs)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
        if has_output and self.call.is_stream:
            if self.first_token_at is None:
                self.first_token_at = at
            self.token_times.append(at)

    def comment(self, text: bytes) -> None:
        """A comment line. Ours say `queue position=3 wait_s=1.2` and `resumed approximate`."""
        self.num_comments += 1
        if text.startswith(b"queue "):
            words = dict(word.partition(b"=")[::2] for word in text.split()[1:16])
            try:
                if self.queue_position is None and b"position" in words:
                    self.queue_position = int(words[b"position"])
                if b"wait_s" in words:
                    self.queue_wait_s = max(self.queue_wait_s or 0.0, float(words[b"wait_s"]))
            except ValueError:
                pass  # somebody else's comment
        elif text.startswith(b"resumed"):
            self.num_resumes += 1

    def observation(self, start_at: float, worker: int = 0) -> Observation:
        """The record's line. start_at: time.monotonic() of the run's second 0."""

        def since(at: float | None) -> float | None:
            return None if at is None else at - start_at

        call, usage = self.call, self.usage
        return Observation(
            id=call.id,
            label=call.label,
            tenant=call.tenant,
            endpoint=call.endpoint,
            is_stream=call.is_stream,
            session=call.session,
            turn=call.turn,
            worker=worker,
            intended_s=self.intended_at - start_at,
            started_s=since(self.started_at),
            sent_s=since(self.sent_at),
            headers_s=since(self.headers_at),
            first_token_s=since(self.first_token_at),
            token_times_s=[at - start_at for at in self.token_times],
            end_s=since(self.end_at),
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            wanted_prompt_tokens=call.wanted_prompt_tokens,
            cached_tokens=None if usage is None else usage.cached_tokens,
            output_tokens=None if usage is None else usage.completion_tokens,
            wanted_output_tokens=call.wanted_output_tokens,
            status=self.status,
            error=None if self.failure is None else self.failure.failure,
            error_detail="" if self.failure is None else " ".join((self.failure.code, self.failure.detail)).strip(),
            finish_reason=self.finish_reason,
            queue_position=self.queue_position,
            queue_wait_s=self.queue_wait_s,
            num_comments=self.num_comments,
            num_resumes=self.num_resumes,
            server_id=self.server_id,
            request_hash=call.hash,
            body_seed=call.body_seed,
        )


def send(answer: Answer, pool: Pool, headers: Mapping[str, str] | None = None) -> None:
    """Send a request and read its answer to the end. Failures are in the answer, not raised."""
    call = answer.call
    answer.started_at = time.monotonic()
    response: Response | None = None
    try:
        response = pool.post(PATHS[call.endpoint], call.body, headers)
        answer.sent_at = response.sent_at
        answer.headers_at = response.headers_at
        answer.status = response.status
        answer.server_id = response.header("x-request-id")[:128]
        if not 200 <= response.status < 300:
            code, message = _error_words(_rest(response))
            raise RequestFailed(of_status(response.status), message, code)
        if not call.is_stream:
            body, answer.end_at = _read_whole(response)
            answer.take(_chunk(body), answer.end_at)
        else:
            _read_stream(response, answer)
    except RequestFailed as failure:
        answer.failure = failure
    finally:
        if response is not None:
            response.close()
    if answer.end_at is None:
        answer.end_at = time.monotonic()


def _read_stream(response: Response, answer: Answer) -> None:
    parser = SseParser()
    if "event-stream" not in response.header("content-type"):
        raise RequestFailed(MALFORMED, f"a stream of {response.header('content-type') or 'nothing'}")
    is_done = False
    while True:
        data, at = response.read()
        if not data:
            break
        try:
            events = parser.feed(data)
        except SseError as error:
            raise RequestFailed(MALFORMED, str(error)) from None
        for event in events:
            if event.is_comment:
                answer.comment(event.data)
            elif event.data == b"[DONE]":
                is_done = True
                answer.end_at = at
            elif not is_done:
                answer.take(_chunk(event.data), at)
    if not is_done:
        raise RequestFailed(TRUNCATED, "the stream ended without [DONE]")


def _rest(response: Response) -> bytes:
    """The body of an error, as far as it comes: its status says more than what is wrong with it."""
    try:
        return _read_whole(response)[0]
    except RequestFailed:
        return b""


def _read_whole(response: Response) -> tuple[bytes, float]:
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        piece, at = response.read()
        if not piece:
            return b"".join(pieces), at
        num_bytes += len(piece)
        if num_bytes > MAX_BODY_BYTES:
            raise RequestFailed(MALFORMED, f"a body of more than {MAX_BODY_BYTES} bytes")
        pieces.append(piece)


# --- OpenAI's shapes, as far as they are looked at -------------------------------------------

_NULL = msgspec.Raw(b"null")


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """`usage` of either endpoint."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int | None:
        return None if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens


class _Part(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Part | None = None
    message: _Part | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"")
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """An event of a stream, or a whole response: both endpoints."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    system_fingerprint: str | None = None
    error: Any = None


class _ChatLogprob(msgspec.Struct):
    token: str = ""
    logprob: float | None = None


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []  # completions
    token_logprobs: list[float | None] = []
    content: list[_ChatLogprob] | None = None  # chat


_CHUNK = msgspec.json.Decoder(Chunk)
_LOGPROBS = msgspec.json.Decoder(_Logprobs)


def _chunk(data: bytes) -> Chunk:
    try:
        return _CHUNK.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestFailed(MALFORMED, str(error)) from None


def _logprobs(raw: msgspec.Raw) -> list[tuple[str, float | None]]:
    try:
        found = _LOGPROBS.decode(raw)
    except msgspec.DecodeError as error:
        raise RequestFailed(MALFORMED, f"logprobs: {error}") from None
    pairs = list(zip(found.tokens, found.token_logprobs, strict=False))
    return pairs + [(entry.token, entry.logprob) for entry in found.content or ()]


def _error_words(error: Any) -> tuple[str, str]:
    """(code, message) of an error body or of an event's `error`."""
    if isinstance(error, bytes):
        try:
            error = msgspec.json.decode(error)
        except msgspec.DecodeError:
            return "", error[:200].decode(errors="replace")
        if isinstance(error, dict):
            error = error.get("error", error)
    if not isinstance(error, dict):
        return "", str(error)[:200]
    return str(error.get("code") or error.get("type") or ""), str(error.get("message") or "")
