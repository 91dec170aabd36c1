"""Requests and choices as the gateway holds them: the journal (C1) that outlives every replica."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from typing import Protocol

from serving.errors import ArgosyError
from serving.gateway.choice_life import ChoiceLife
from serving.types import FinishReason, ModelCard, SamplingParams


@dataclasses.dataclass(slots=True, eq=False)
class Choice:
    """One sampled continuation. `output_ids` and `logprobs` are append-only; all else derives from them."""

    index: int  # prompt_i * n + j
    request: Request
    prompt_ids: bytes  # int32[]
    sampling: SamplingParams
    output_ids: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    logprobs: list[bytes] = dataclasses.field(default_factory=list)  # packed as in wire.Step, one per token
    finish: FinishReason | None = None  # set by the engine's word only
    stop_token_id: int = -1
    cached_tokens: int | None = None  # fixed at first admission (C21)
    error: ArgosyError | None = None  # set once; the choice is over
    num_resumes: int = 0
    life: ChoiceLife = dataclasses.field(default_factory=ChoiceLife)

    @property
    def is_done(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A validated, tokenised request, fixed at admission (C1)."""

    id: str
    created: int
    card: ModelCard  # of the fleet that serves it: the fingerprint is pinned
    deadline: float  # on the monotonic clock
    priority: int = 0
    salt: bytes = b""
    choices: list[Choice] = dataclasses.field(default_factory=list)
    queued_at: float | None = None  # on the data plane's clock
    started_at: float | None = None  # when a replica took the first choice
    on_progress: Callable[[Choice], None] = lambda choice: None
    """Called in the event loop, at most once per choice and engine frame, after the journal has
    grown or the choice has ended. Must not block and must not raise."""


class Dispatcher(Protocol):
    """What the API layer needs of the data plane."""

    def card(self, model: str) -> ModelCard | None:
        """Card of the served model, None when the name is unknown. The last known card stays
        while every replica is down: requests then wait in the queue."""
        ...

    def submit(self, request: Request) -> None:
        """Queue all choices. Raises NoCapacity (with retry_after_s) when the queue is full."""
        ...

    def cancel(self, choice: Choice) -> None:
        """Forget the choice: leave the queue or free its row. Idempotent; no progress follows."""
        ...

    def queue_position(self, request: Request) -> tuple[int, float] | None:
        """(position, predicted wait in seconds) of a request still queued, else None."""
        ...
