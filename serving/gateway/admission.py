"""What may enter: bounded preparation, prompts that fit, choices with every parameter fixed (C1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import msgspec

from serving.errors import ContextLengthExceeded, InvalidRequest, NoCapacity
from serving.gateway.bodies import Generation
from serving.gateway.fields import wrong
from serving.gateway.language import Tokens
from serving.gateway.streams import Choice, Request
from serving.types import FinishReason, ModelCard, SamplingParams
from serving.wire import pack_ids

MAX_PREPARING = 1024
"""Requests of one gateway process between their last byte and the queue."""
MAX_BODY_BYTES = 256 << 20
"""Of all bodies that one gateway process holds. Bytes, not requests: a slow sender must not take a fast one's place."""
MAX_LOGPROBS = 1 << 22
"""Log-probabilities of one request: choices × tokens × (alternatives + 1). Each is up to 80 bytes of a reply."""


class Admission:
    """Counts requests under preparation and refuses at once when there are too many (C14)."""

    def __init__(self, max_preparing: int = MAX_PREPARING, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._max_preparing = max_preparing
        self._max_body_bytes = max_body_bytes
        self.num_preparing = 0
        self.body_bytes = 0

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Around a body's life: the yielded function counts bytes as they arrive. It raises NoCapacity."""
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            if self.body_bytes + num_bytes > self._max_body_bytes:
                message = f"The gateway holds {self.body_bytes} bytes of request bodies already; try again shortly."
                raise NoCapacity(message, retry_after_s=1.0, reason="saturated")
            held += num_bytes
            self.body_bytes += num_bytes

        try:
            yield hold
        finally:
            self.body_bytes -= held

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Held while a request is parsed and tokenised. Raises NoCapacity."""
        if self.num_preparing >= self._max_preparing:
            message = f"The gateway is preparing {self.num_preparing} requests already; try again shortly."
            raise NoCapacity(message, retry_after_s=1.0, reason="saturated")
        self.num_preparing += 1
        try:
            yield
        finally:
            self.num_preparing -= 1


def fit(prompt_ids: Tokens, generation: Generation, card: ModelCard, param: str) -> tuple[bytes, int]:
    """(int32 prompt bytes, max_tokens) of one prompt within the model's context.

    Raises ContextLengthExceeded with all the numbers, InvalidRequest when min_tokens cannot be met or the
    tokenizer made nothing of the text.
    """
    limit = card.max_model_len
    keep = generation.truncate_prompt_tokens
    if keep is not None:
        if keep == -1:
            keep = max(limit - (1 if generation.max_tokens is None else generation.max_tokens), 1)
        prompt_ids = prompt_ids[-keep:]
    num_prompt = len(prompt_ids)
    if not num_prompt:
        raise InvalidRequest(f"Invalid value for '{param}': the text has no tokens.", param=param)
    wanted = generation.max_tokens
    if num_prompt + (1 if wanted is None else wanted) > limit or num_prompt > limit:
        given = f"{num_prompt} tokens" + ("" if wanted is None else f" and the completion {wanted}")
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, but the prompt has {given}.",
            param=param if wanted is None or num_prompt >= limit else "max_tokens",
        )
    max_tokens = limit - num_prompt if wanted is None else wanted
    if generation.sampling.min_tokens > max_tokens:
        raise wrong(
            "min_tokens", f"at most the {max_tokens} tokens left of the context", generation.sampling.min_tokens
        )
    return pack_ids(prompt_ids), max_tokens


def _check_allowed(sampling: SamplingParams, card: ModelCard) -> None:
    """Something must be left to sample while min_tokens forbids the end."""
    if sampling.allowed_token_ids is None or not sampling.min_tokens:
        return
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(card.eos_ids))
    if ends.issuperset(sampling.allowed_token_ids):
        expected = f"an id that does not end the completion before min_tokens ({sampling.min_tokens})"
        raise wrong("allowed_token_ids", expected, list(sampling.allowed_token_ids))


def make_request(
    *,
    request_id: str,
    created: int,
    card: ModelCard,
    deadline: float,
    generation: Generation,
    prompts: Sequence[Tokens],
    param: str,
    salt: bytes,
    draw_seed: Callable[[], int],
) -> Request:
    """The request with all its choices, prompt-major. Raises as `fit`, and InvalidRequest for limits that only
    the whole request shows.

    A choice that wants no tokens at all (max_tokens 0) is finished from the start. A choice samples with its
    index in the whole request: equal prompts of one request differ, and the same request repeats itself.
    """
    _check_allowed(generation.sampling, card)
    num_logprobs = 0
    request = Request(request_id, created, card, deadline, generation.priority, salt)
    seed = draw_seed() if generation.seed is None else generation.seed & (2**64 - 1)
    for prompt in prompts:
        packed, max_tokens = fit(prompt, generation, card, param)
        num_logprobs += generation.n * max_tokens * (generation.sampling.logprobs + 1)
        if num_logprobs > MAX_LOGPROBS:
            raise wrong("logprobs", f"at most {MAX_LOGPROBS} log-probabilities in one reply", num_logprobs)
        for _ in range(generation.n):
            index = len(request.choices)
            sampling = msgspec.structs.replace(
                generation.sampling, seed=seed, choice=index, max_tokens=max(max_tokens, 1)
            )
            choice = Choice(index, request, packed, sampling)
            if max_tokens == 0:
                choice.finish = FinishReason.LENGTH
            request.choices.append(choice)
    return request
