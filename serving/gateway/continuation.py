"""The text of one choice as a function of its tokens (C21): detokenised, stopped, ended."""

from __future__ import annotations

import dataclasses

from serving.gateway.text.detokenizer import Detokenizer
from serving.gateway.text.stop import StopMatcher
from serving.types import ModelCard, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """When a choice ends, as far as its token ids alone decide it."""

    eos_ids: frozenset[int]
    stop_ids: frozenset[int]  # eos ids included
    max_tokens: int
    min_tokens: int

    @classmethod
    def of(cls, card: ModelCard, sampling: SamplingParams) -> Ending:
        eos_ids = frozenset() if sampling.ignore_eos else frozenset(card.eos_ids)
        stop_ids = eos_ids | frozenset(sampling.stop_token_ids)
        return cls(eos_ids, stop_ids, sampling.max_tokens, sampling.min_tokens)


class Continuation:
    """Feed it every output token in order; it says what text each one adds and when it is over.

    The rules of the engine are known here as well, so the last token's text and the finish reason
    leave in one event, however the engine's frames were cut. Text of the stop token is not part of
    the output; the token itself counts.
    """

    __slots__ = (
        "_detokenizer",
        "_ending",
        "_matcher",
        "_max_tokens",
        "_push",
        "_stop_ids",
        "decoded_len",
        "finish_reason",
        "num_tokens",
        "stop_reason",
    )

    def __init__(self, ending: Ending, detokenizer: Detokenizer, matcher: StopMatcher | None) -> None:
        self._ending = ending
        self._stop_ids = ending.stop_ids
        self._max_tokens = ending.max_tokens
        self._detokenizer = detokenizer
        self._push = detokenizer.push
        self._matcher = matcher
        self.num_tokens = 0
        self.decoded_len = 0  # characters of all text so far, shown or held back
        self.finish_reason: str | None = None  # "stop" | "length"
        self.stop_reason: int | str | None = None  # the stop string or the stop token id; None for end-of-sequence

    def feed(self, token_id: int) -> str:
        """Text that this token lets out; often one word piece, sometimes none."""
        self.num_tokens += 1
        if token_id in self._stop_ids:
            text = self._finish("stop")
            if self.stop_reason is None and token_id not in self._ending.eos_ids:
                self.stop_reason = token_id
            return text
        text = self._push(token_id)
        self.decoded_len += len(text)
        if self._matcher is not None:
            text = self._match(text)
        if self.num_tokens >= self._max_tokens and self.finish_reason is None:
            text += self._finish("length")
        return text

    def close(self, reason: str) -> str:
        """The engine ended the row before these rules did. Returns the text held back."""
        return self._finish(reason)

    def _match(self, text: str) -> str:
        # before min_tokens nothing may end the choice, so nothing is searched either
        if self._matcher is None or self.num_tokens < self._ending.min_tokens:
            return text
        shown, matched = self._matcher.feed(text)
        if matched is not None:
            self.finish_reason = "stop"
            self.stop_reason = matched
        return shown

    def _finish(self, reason: str) -> str:
        """Let out what was held back; a half character in it may still complete a stop string."""
        rest = self._detokenizer.finish()
        self.decoded_len += len(rest)
        self.finish_reason = reason
        text = self._match(rest)
        if self._matcher is not None and self.stop_reason is None:
            text += self._matcher.flush()
        return text
