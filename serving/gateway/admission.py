"""What may enter: bounded preparation, prompts that fit, choices with every parameter fixed (C1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import msgspec

from serving.errors import ContextLengthExceeded, NoCapacity
from serving.gateway.bodies import Generation
from serving.gateway.fields import wrong
from serving.gateway.language import Tokens
from serving.gateway.streams import Choice, Request
from serving.types import FinishReason, ModelCard
from serving.wire import pack_ids

MAX_PREPARING = 1024
"""Requests of one gateway process between their first byte and the queue: bodies in memory."""


class Admission:
    """Counts requests under preparation and refuses at once when there are too many (C14)."""

    def __init__(self, max_preparing: int = MAX_PREPARING) -> None:
        self._max_preparing = max_preparing
        self.num_preparing = 0

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Held while a request is read, parsed and tokenised. Raises NoCapacity."""
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

    Raises ContextLengthExceeded with all the numbers, InvalidRequest when min_tokens cannot be met.
    """
    limit = card.max_model_len
    keep = generation.truncate_prompt_tokens
    if keep is not None:
        if keep == -1:
            keep = max(limit - (1 if generation.max_tokens is None else generation.max_tokens), 1)
        prompt_ids = prompt_ids[-keep:]
    num_prompt = len(prompt_ids)
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
    """The request with all its choices, prompt-major. Raises as `fit`.

    A choice that wants no tokens at all (max_tokens 0) is finished from the start.
    """
    request = Request(request_id, created, card, deadline, generation.priority, salt)
    seed = draw_seed() if generation.seed is None else generation.seed & (2**64 - 1)
    for prompt in prompts:
        packed, max_tokens = fit(prompt, generation, card, param)
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
