"""One choice inside the engine."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from serving.block_hash import BlockHash
from serving.errors import ContextLengthExceeded, InvalidRequest
from serving.types import SamplingParams, Wait

Int32Array = npt.NDArray[np.int32]


class Phase(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()  # finished, cancelled or refused; its slot may still be in a step in flight


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A choice to be computed. Its numbers live in the scheduler's rows while it has a slot.

    key: (connection, handle) of whoever reads the output.
    tokens: int32, prompt then outputs known when it last entered the queue.
    """

    key: tuple[int, int]
    tokens: Int32Array
    num_prompt: int
    max_total: int  # prompt and output tokens together
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    priority: int
    root: BlockHash
    sequence: int = 0  # order of arrival; kept across preemptions
    phase: Phase = Phase.WAITING
    slot: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)
    hashes: list[BlockHash] = dataclasses.field(default_factory=list)  # of full blocks, as far as known
    leads: BlockHash | None = None  # siblings wait until it has committed the blocks up to here
    is_preempting: bool = False
    was_admitted: bool = False
    num_preemptions: int = 0
    waits_for: Wait | None = None  # what kept it out when its turn last came

    def check_fits(self, max_model_len: int, cache_tokens: int) -> None:
        """cache_tokens: that the replica's KV cache holds.

        Raises ContextLengthExceeded or InvalidRequest, with the numbers, when the request can never be served.
        """
        num_tokens = len(self.tokens)
        if num_tokens >= max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_model_len} tokens, and {num_tokens} are taken already: "
                "none can be generated.",
                param="prompt",
            )
        if num_tokens >= self.max_total:
            text = f"max_tokens is {self.sampling.max_tokens}; {num_tokens - self.num_prompt} are there already."
            raise InvalidRequest(text, param="max_tokens")
        if self.max_total > cache_tokens:
            raise InvalidRequest(
                f"The request may grow to {self.max_total} tokens; the replica's KV cache holds {cache_tokens}.",
                param="max_tokens",
                code="request_too_large",
            )
