"""A step's work as one flat int32 array (C6): the same bytes go to every rank.

Ranks keep persistent rows (slots): token ids, block tables, sampling parameters. A plan carries
only what changed. Layout, all int32 little-endian:

    header      step, num_rows, num_token_ids, num_finished, num_block_updates,
                num_new_blocks, num_new_rows, num_payload_words
    rows        slots[num_rows]  num_tokens[num_rows]  starts[num_rows]  num_samples[num_rows]
    inputs      token ids[num_token_ids]: none, or sum(num_tokens)
    finished    slots whose row is over[num_finished]
    blocks      (slot, first index, count)[num_block_updates]  block ids[num_new_blocks]
    new rows    (slot, num_prompt, num_known, sampling bytes)[num_new_rows]
    payload     per new row: token ids[num_known], sampling parameters (msgpack, padded to words)

`num_samples` of a row is how many of its last tokens are sampled after: 0 inside a prompt, 1 for
decoding, more when drafts are verified. Applied in this order: finished, new rows, blocks, rows.

The inputs are there for gangs: a rank that does not sample cannot know them. A single rank keeps
what it sampled, and gets none.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from serving.engine.request import Int32Array
from serving.types import SamplingParams

_HEADER_WORDS = 8
_STEP_MASK = 0x7FFFFFFF  # at 1,000 steps a second, int32 lasts 24 days
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SamplingParams)

NO_IDS: Int32Array = np.zeros(0, np.int32)


@dataclasses.dataclass(slots=True, frozen=True)
class NewRow:
    """A row that enters `slot` with all tokens known so far (prompt, then outputs: C2)."""

    slot: int
    num_prompt: int
    tokens: Int32Array
    sampling: SamplingParams


@dataclasses.dataclass(slots=True, frozen=True)
class Plan:
    """One step. Arrays of int32; rows are in the order in which results come back."""

    step: int
    slots: Int32Array
    num_tokens: Int32Array
    starts: Int32Array
    num_samples: Int32Array
    finished: Int32Array
    block_updates: Int32Array  # [num_block_updates, 3]: slot, first index, count
    block_ids: Int32Array
    new_rows: tuple[NewRow, ...]
    token_ids: Int32Array = dataclasses.field(default_factory=lambda: NO_IDS)  # inputs, where ranks need them

    def encode(self) -> Int32Array:
        """The flat array."""
        table: list[int] = []
        payload: list[Int32Array] = []
        for row in self.new_rows:
            sampling = _encoder.encode(row.sampling)
            table += (row.slot, row.num_prompt, len(row.tokens), len(sampling))
            payload.append(row.tokens)
            payload.append(np.frombuffer(sampling + bytes(-len(sampling) % 4), np.int32))
        header = (
            self.step & _STEP_MASK,
            len(self.slots),
            len(self.token_ids),
            len(self.finished),
            len(self.block_updates),
            len(self.block_ids),
            len(self.new_rows),
            sum(map(len, payload)),
        )
        return np.concatenate(
            (
                np.array(header, np.int32),
                self.slots,
                self.num_tokens,
                self.starts,
                self.num_samples,
                self.token_ids,
                self.finished,
                self.block_updates.reshape(-1),
                self.block_ids,
                np.array(table, np.int32),
                *payload,
            )
        )


def decode_plan(words: Int32Array) -> Plan:
    """Inverse of `Plan.encode`; arrays are views and `step` is modulo 2**31.

    Raises ValueError when the lengths disagree or the sampling parameters are none.
    """
    if len(words) < _HEADER_WORDS:
        raise ValueError(f"a plan of {len(words)} words has no header")
    header = words[:_HEADER_WORDS].tolist()
    step, num_rows, num_inputs, num_finished, num_updates, num_ids, num_new, num_payload = header
    num_changes = num_finished + 3 * num_updates + num_ids + 4 * num_new + num_payload
    expected = _HEADER_WORDS + 4 * num_rows + num_inputs + num_changes
    if expected != len(words) or min(header) < 0:
        raise ValueError(f"a plan of {len(words)} words announces {expected}: {header}")
    at = _HEADER_WORDS

    def take(count: int) -> Int32Array:
        nonlocal at
        at += count
        return words[at - count : at]

    slots, num_tokens, starts, num_samples = take(num_rows), take(num_rows), take(num_rows), take(num_rows)
    token_ids = take(num_inputs)
    if num_inputs and num_inputs != int(num_tokens.sum()):
        raise ValueError(f"{num_inputs} inputs for rows of {num_tokens.tolist()} tokens")
    finished = take(num_finished)
    updates = take(3 * num_updates).reshape(-1, 3)
    block_ids = take(num_ids)
    if (updates < 0).any() or int(updates[:, 2].sum()) != num_ids:
        raise ValueError(f"block updates {updates.tolist()} for {num_ids} block ids")
    table = take(4 * num_new).reshape(-1, 4).tolist()
    if min(map(min, table), default=0) < 0 or sum(known + (size + 3) // 4 for *_, known, size in table) != num_payload:
        raise ValueError(f"new rows {table} for a payload of {num_payload} words")
    new_rows = []
    for slot, num_prompt, num_known, num_bytes in table:
        tokens = take(num_known)
        try:
            sampling = _decoder.decode(take((num_bytes + 3) // 4).tobytes()[:num_bytes])
        except msgspec.MsgspecError as error:
            raise ValueError(f"sampling parameters of slot {slot}: {error}") from None
        new_rows.append(NewRow(slot, num_prompt, tokens, sampling))
    return Plan(step, slots, num_tokens, starts, num_samples, finished, updates, block_ids, tuple(new_rows), token_ids)
