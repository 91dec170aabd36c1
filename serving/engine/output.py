"""What a step brought to those who wait for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from serving.engine.request import Int32Array
from serving.types import FinishReason, Note, StepRecord


@dataclasses.dataclass(slots=True)
class StepOutput:
    """Tokens in row order. A reader is known by its key: (connection, handle)."""

    step: int
    connections: Int32Array
    handles: npt.NDArray[np.uint32]
    tokens: Int32Array
    logprobs: Mapping[int, bytes]  # index into tokens -> packed as in wire.Step
    finished: list[tuple[int, int, FinishReason, int]]  # connection, handle, reason, stop id or -1
    failed: list[tuple[int, int]]  # connection, handle: the model computed garbage for this row
    admitted: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # connection, handle, cached tokens
    notes: list[tuple[int, int, Note, int]] = dataclasses.field(default_factory=list)  # connection, handle, kind, value
    record: StepRecord | None = None


def renumber(logprobs: Mapping[int, bytes], live: npt.NDArray[np.bool_]) -> dict[int, bytes]:
    """Keys are indices into all sampled rows; make them indices into the live ones."""
    index = np.cumsum(live) - 1
    return {int(index[at]): packed for at, packed in logprobs.items() if live[at]}
