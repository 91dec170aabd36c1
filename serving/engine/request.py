"""One choice inside the engine."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from serving.block_hash import BlockHash
from serving.types import SamplingParams

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
