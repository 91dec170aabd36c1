"""The scheduler's rows: one slot per running request, as a structure of arrays.

    tokens      | prompt ........ | outputs known | outputs in flight |
                0           num_done <= num_computed <= num_tokens <= max_total
                                             num_known <= num_tokens
                            |        |
                            |        handed out to steps
                            computed in completed steps

Per-step work on these arrays is vectorised; the `Request` objects are touched only when a row
enters, leaves or fills a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serving.engine.request import Int32Array, Request

MAX_STOP_IDS = 64
"""Stop and end-of-sequence ids per row; the gateway's schema keeps a request below it."""

_NO_TOKEN = -1


class Rows:
    """Numbers of up to `num_slots` rows of up to `max_len` tokens. Memory is touched as rows grow."""

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.tokens: Int32Array = np.zeros((num_slots, max_len), np.int32)
        self.num_tokens = _int32(num_slots)
        self.num_computed = _int32(num_slots)
        self.num_done = _int32(num_slots)
        self.num_known = _int32(num_slots)  # tokens whose values have arrived; kept up where inputs are sent
        self.max_total = _int32(num_slots)
        self.num_blocks = _int32(num_slots)
        self.num_sent_blocks = _int32(num_slots)  # block table entries that the ranks know
        self.num_committed_blocks = _int32(num_slots)
        self.num_in_flight = _int32(num_slots)  # unfinished steps that touch the row
        self.is_live: npt.NDArray[np.bool_] = np.zeros(num_slots, np.bool_)  # its outputs have a reader
        self.is_leaving: npt.NDArray[np.bool_] = np.zeros(num_slots, np.bool_)  # gone after its last step in flight
        self.connection = _int32(num_slots)
        self.handle: npt.NDArray[np.uint32] = np.zeros(num_slots, np.uint32)
        self.rank: npt.NDArray[np.int64] = np.zeros(num_slots, np.int64)  # smaller is served first
        self.stop_ids: Int32Array = np.full((num_slots, 1), _NO_TOKEN, np.int32)
        self.requests: list[Request | None] = [None] * num_slots

    def enter(self, slot: int, request: Request, num_cached: int) -> None:
        """Fill `slot` from `request`, whose first `num_cached` tokens are already in the cache."""
        num_tokens = len(request.tokens)
        self.tokens[slot, :num_tokens] = request.tokens
        self.num_tokens[slot] = self.num_known[slot] = num_tokens
        self.num_computed[slot] = self.num_done[slot] = num_cached
        self.max_total[slot] = request.max_total
        self.num_blocks[slot] = len(request.blocks)
        self.num_sent_blocks[slot] = 0
        self.num_in_flight[slot] = 0
        self.is_live[slot] = True
        self.is_leaving[slot] = False
        self.rank[slot] = rank(request)
        self.bind(slot, request)
        self._set_stop_ids(slot, request.stop_ids)
        self.requests[slot] = request

    def bind(self, slot: int, request: Request) -> None:
        """Outputs of `slot` go to the request's present key."""
        self.connection[slot], self.handle[slot] = request.key

    def request_in(self, slot: int) -> Request:
        """The row's request; the slot must be taken."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def hand_out(self, slots: Int32Array, ends: Int32Array) -> Int32Array:
        """A step computes `slots` up to `ends`. Returns how many tokens each of them samples (0 or 1)."""
        samples: Int32Array = (ends == self.num_tokens[slots]).astype(np.int32)
        self.num_computed[slots] = ends
        self.num_tokens[slots] += samples
        self.num_in_flight[slots] += 1
        return samples

    def lack(self, slots: Int32Array) -> Int32Array:
        """How many tokens each of `slots` has still to compute."""
        return np.minimum(self.num_tokens[slots], self.max_total[slots] - 1) - self.num_computed[slots]

    def ready(self, slots: Int32Array) -> Int32Array:
        """How many of them could be sent now: none of a row whose last sample is still in flight."""
        return np.minimum(self.num_known[slots], self.max_total[slots] - 1) - self.num_computed[slots]

    def inputs(self, slots: Int32Array, starts: Int32Array, counts: Int32Array) -> Int32Array:
        """Values of tokens `starts` to `starts + counts` of each row, one row after the other."""
        if int(counts.sum()) == len(slots):
            return self.tokens[slots, starts]
        row_of = np.repeat(np.arange(len(slots)), counts)
        before = np.cumsum(counts) - counts
        return self.tokens[slots[row_of], np.arange(len(row_of)) + (starts - before)[row_of]]

    def take_table_updates(self, slots: Int32Array) -> tuple[Int32Array, Int32Array]:
        """Block table entries of `slots` that the ranks do not know yet: they are told now.

        Returns (slot, first index, count) per changed row [n, 3], and the block ids one after the other.
        """
        grown = slots[self.num_blocks[slots] > self.num_sent_blocks[slots]]
        updates, ids = [], []
        for slot in grown.tolist():
            known = int(self.num_sent_blocks[slot])
            fresh = self.request_in(slot).blocks[known:]
            updates.append((slot, known, len(fresh)))
            ids += fresh
        self.num_sent_blocks[grown] = self.num_blocks[grown]
        return np.array(updates, np.int32).reshape(-1, 3), np.array(ids, np.int32)

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        width = self.stop_ids.shape[1]
        if len(stop_ids) > width:  # rare: most rows have the model's one or two
            grown = np.full((self.num_slots, len(stop_ids)), _NO_TOKEN, np.int32)
            grown[:, :width] = self.stop_ids
            self.stop_ids = grown
        self.stop_ids[slot] = _NO_TOKEN
        self.stop_ids[slot, : len(stop_ids)] = stop_ids


def rank(request: Request) -> int:
    """Order of service: priority, then arrival. Preemption goes through it backwards."""
    return -(request.priority << 40) + request.sequence


def _int32(count: int) -> Int32Array:
    return np.zeros(count, np.int32)
