"""A plan's work as flat arrays on the host: what `models.batch.Batch` says, before it goes to the device."""

from __future__ import annotations

import dataclasses

import numpy as np

from serving.engine.plan import Plan
from serving.engine.request import Int32Array


@dataclasses.dataclass(slots=True)
class StepArrays:
    """R rows with T tokens, of which S rows are sampled."""

    slots: Int32Array  # [R]
    query_start_loc: Int32Array  # [R + 1]
    seq_lens: Int32Array  # [R]
    token_ids: Int32Array  # [T]
    positions: Int32Array  # [T]
    places: Int32Array  # [T], block id * block size + offset
    token_slots: Int32Array  # [T]
    sampled_slots: Int32Array  # [S]
    ends: Int32Array  # [S], tokens of the row with this step's
    logits_indices: Int32Array  # [S]
    max_query_len: int
    max_seq_len: int

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token and is sampled after it."""
        return len(self.token_ids) == len(self.slots) == len(self.sampled_slots)


def step_arrays(plan: Plan, tokens: Int32Array, tables: Int32Array, block_size: int) -> StepArrays:
    """tokens: int32 [slots, positions]; the plan's own win. tables: int32 [slots, blocks of a row]."""
    counts, starts, slots = plan.num_tokens, plan.starts, plan.slots
    num_rows = len(counts)
    query_start_loc = np.zeros(num_rows + 1, np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    seq_lens = starts + counts
    max_query_len = int(counts.max())
    if max_query_len == 1:
        token_slots, positions = slots, starts
    else:
        row_of = np.repeat(np.arange(num_rows), counts)
        token_slots = slots[row_of]
        positions = np.arange(len(row_of), dtype=np.int32) + (starts - query_start_loc[:-1])[row_of]
    places = tables[token_slots, positions // block_size] * block_size
    places += positions % block_size
    is_sampled = plan.num_samples > 0
    return StepArrays(
        slots=slots,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        token_ids=plan.token_ids if len(plan.token_ids) else tokens[token_slots, positions],
        positions=positions,
        places=places,
        token_slots=token_slots,
        sampled_slots=slots[is_sampled],
        ends=seq_lens[is_sampled],
        logits_indices=query_start_loc[1:][is_sampled] - np.int32(1),
        max_query_len=max_query_len,
        max_seq_len=int(seq_lens.max()),
    )
