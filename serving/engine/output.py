"""What a step brought to those who wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serving.engine.request import Int32Array
from serving.types import FinishReason, Note, StepRecord


@dataclass(slots=True)
class StepOutput:
    """Tokens in row order. A reader is known by its key: (connection, handle).

    logprobs: index into tokens -> packed as in wire.Step. finished: key, reason, stop id or -1. failed: keys of rows
    for which the model computed garbage. admitted: key, cached tokens. notes: key, kind, value.
    """

    step: int
    connections: Int32Array
    handles: npt.NDArray[np.uint32]
    tokens: Int32Array
    logprobs: Mapping[int, bytes]
    finished: list[tuple[int, int, FinishReason, int]] = field(default_factory=list)
    failed: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[tuple[int, int, int]] = field(default_factory=list)
    notes: list[tuple[int, int, Note, int]] = field(default_factory=list)
    record: StepRecord | None = None


def renumber(logprobs: Mapping[int, bytes], live: npt.NDArray[np.bool_]) -> dict[int, bytes]:
    """Keys are indices into all sampled rows; make them indices into the live ones."""
    index = np.cumsum(live) - 1
    return {int(index[at]): packed for at, packed in logprobs.items() if live[at]}
