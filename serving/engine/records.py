"""A fixed-size record of every step in a ring (C17): metrics, the cost model and traces read it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RECORD = np.dtype(
    [
        ("step", np.int64),
        ("started_s", np.float64),  # monotonic clock
        ("duration_s", np.float32),  # to its result, from its submission or its predecessor's result
        ("announced_s", np.float32),  # predicted before it ran
        ("num_rows", np.int32),
        ("num_prefill_tokens", np.int32),
        ("num_decode_tokens", np.int32),
        ("context_tokens", np.int64),  # sum of context lengths: KV read
        ("num_waiting", np.int32),
        ("blocks_used", np.int32),
        ("ideal_s", np.float32),  # at the hardware's limit; NaN = not known
    ]
)


class StepRecords:
    """The last `capacity` steps. One writer; readers may see the newest record half written."""

    def __init__(self, capacity: int = 4096) -> None:
        self._ring: npt.NDArray[np.void] = np.zeros(capacity, RECORD)
        self._count = 0

    def append(self, *values: float) -> None:
        """Fields in the order of RECORD."""
        self._ring[self._count % len(self._ring)] = values
        self._count += 1

    def last(self, count: int) -> npt.NDArray[np.void]:
        """Up to `count` newest records, oldest first (a copy)."""
        size = min(count, self._count, len(self._ring))
        indices = np.arange(self._count - size, self._count) % len(self._ring)
        return self._ring[indices].copy()
