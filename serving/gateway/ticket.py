"""A choice's passage through the data plane: waiting in a queue, or running on a link."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from serving.gateway.streams import Choice, Request
from serving.types import FinishReason, ModelCard

MAX_DEATHS = 3
"""Replicas that may die in a row under a request that does not progress at all (D7)."""
MAX_SHORT_LIVES = 32
SHORT_LIFE_TOKENS = 16
"""… and under one that progresses by less than this many tokens each time."""


class Carrier(Protocol):
    """What runs a ticket: a link to a replica."""

    def cancel(self, ticket: Ticket) -> None: ...


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """What the tickets of one request share."""

    request: Request
    tickets: list[Ticket] = dataclasses.field(default_factory=list)
    num_deaths: int = 0  # replicas that died under it without a token of progress in between
    num_short_lives: int = 0
    num_tokens_at_death: int = -1

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.output_ids) for choice in self.request.choices)

    @property
    def is_suspect(self) -> bool:
        """One more death without progress convicts it: it runs apart from other newcomers until it progresses."""
        return self.num_deaths == MAX_DEATHS - 1 and self.num_tokens <= self.num_tokens_at_death

    @property
    def is_convicted(self) -> bool:
        return self.num_deaths >= MAX_DEATHS or self.num_short_lives >= MAX_SHORT_LIVES

    def record_death(self) -> None:
        """A running step that held some of its rows never came back.

        A stream that progressed since the last death did not cause that one: a poisonous request kills
        the same step again, while an innocent one may meet any number of unlucky replicas in its life.
        """
        num_tokens = self.num_tokens
        progress = num_tokens - max(self.num_tokens_at_death, 0)
        if progress > 0:
            self.num_deaths = 0
        if progress >= SHORT_LIFE_TOKENS:
            self.num_short_lives = 0
        self.num_tokens_at_death = num_tokens
        self.num_deaths += 1
        self.num_short_lives += 1


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """One unfinished choice. In a queue, or on a link, or (between the two) in the dispatcher's hands."""

    choice: Choice
    job: Job
    order: int  # of arrival; kept by a resume, so that it returns to its place at the front
    priority: int  # higher is served first
    enqueued_at: float
    expires: float  # on the monotonic clock: when waiting ends, or, once it runs, the request's deadline
    goes_first: bool = False  # it was served before and came back: a resume, or a permit taken back
    is_queued: bool = False
    carrier: Carrier | None = None
    handle: int = 0  # on the carrier
    is_admitted: bool = False  # by the carrier's scheduler: its death may be this row's doing
    num_uncomputed: int = 0  # tokens that the carrier has yet to prefill; 0 once it is admitted
    is_over: bool = False  # finished, failed or cancelled: nothing more is reported
    bucket: int = -1  # in Deadlines
    ahead: int = 0  # in its lane when it joined
    mark: int = 0  # number of tickets that had left its lane when it joined

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.choice.prompt_ids) // 4

    @property
    def num_tokens(self) -> int:
        """Prompt and journal: the same for as long as it waits."""
        return self.num_prompt_tokens + len(self.choice.output_ids)


def settled(choice: Choice, card: ModelCard) -> tuple[FinishReason, int] | None:
    """(reason, stop token id or -1) when the journal alone shows that the choice is complete.

    A replica may die between a row's last token and the word that it was the last. Such a choice must
    not be resumed: it would grow beyond its end. The rule is the engine's: a stop id wins over length.
    """
    ids = choice.output_ids
    if not ids:
        return None
    sampling = choice.sampling
    last = ids[-1]
    if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in card.eos_ids):
        return FinishReason.STOP, last
    if len(ids) >= sampling.max_tokens or len(choice.prompt_ids) // 4 + len(ids) >= card.max_model_len:
        return FinishReason.LENGTH, -1
    return None
