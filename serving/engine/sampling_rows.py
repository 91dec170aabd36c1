"""How each slot is sampled: persistent rows in structure-of-arrays form (C6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serving.engine.logit_edits import LogitEdits, needs_edits
from serving.engine.noise import noise_key
from serving.types import SamplingParams

RANDOM = 1  # drawn from a distribution; without this bit: argmax
EDITED = 2  # has an entry in `edits`
SCORED = 4  # wants log-probabilities

_LARGEST_INVERSE = 1e30  # of a temperature: beyond this, only ties with the best logit are left anyway


class SamplingRows:
    """Sampling parameters of every slot. Written when a row enters or leaves a slot, read every step.

    All arrays are [max_num_seqs], indexed by slot. A cleared slot is a plain greedy one.
    """

    def __init__(
        self,
        max_num_seqs: int,
        logits_size: int,
        tokenizer_size: int,
        eos_ids: Sequence[int],
    ) -> None:
        """logits_size: width of the model's logits; ids >= tokenizer_size are never sampled (C23).

        Raises ValueError for sizes or ids that contradict each other.
        """
        if not 1 <= tokenizer_size <= logits_size:
            raise ValueError(f"tokenizer_size {tokenizer_size} is not in 1..{logits_size} (the logits size)")
        for eos_id in eos_ids:
            if not 0 <= eos_id < logits_size:
                raise ValueError(f"eos_ids: token id {eos_id} is not below the logits size of {logits_size}")
        self.max_num_seqs = max_num_seqs
        self.logits_size = logits_size
        self.tokenizer_size = tokenizer_size
        self.eos_ids = tuple(eos_ids)
        self.kind = np.zeros(max_num_seqs, np.uint8)  # RANDOM | EDITED | SCORED
        self.temperature = np.zeros(max_num_seqs, np.float64)
        self.inverse_temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)  # 0 = off
        self.top_p = np.ones(max_num_seqs, np.float64)  # 1 = off
        self.min_p = np.zeros(max_num_seqs, np.float64)  # 0 = off
        self.noise_key = np.zeros(max_num_seqs, np.uint64)
        self.num_logprobs = np.zeros(max_num_seqs, np.int32)  # alternatives beside the sampled token
        self.edits: dict[int, LogitEdits] = {}

    def set_row(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: npt.NDArray[np.int32],
        output_ids: npt.NDArray[np.int32],
    ) -> None:
        """Put a row into `slot`.

        output_ids int32: tokens that already count as output: resumed (C2) or sampled before a preemption.
        Raises ValueError when a token id that the row needs is not below the logits size, and IndexError for
        a slot that does not exist; the slot keeps its old row then.
        """
        self._check_slot(slot)
        is_random = params.temperature > 0.0 and params.top_p > 0.0
        kind = RANDOM if is_random else 0
        edits = None
        if needs_edits(params):
            edits = LogitEdits(params, self.eos_ids, self.logits_size, prompt_ids, output_ids)
            kind |= EDITED
        if params.logprobs >= 0:
            kind |= SCORED
        self.edits.pop(slot, None)
        if edits is not None:
            self.edits[slot] = edits
        self.kind[slot] = kind
        self.temperature[slot] = params.temperature
        self.inverse_temperature[slot] = min(1.0 / params.temperature, _LARGEST_INVERSE) if is_random else 0.0
        self.top_k[slot] = max(0, min(params.top_k, self.logits_size))
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.noise_key[slot] = noise_key(params.seed, params.choice)
        self.num_logprobs[slot] = min(params.logprobs, self.tokenizer_size)

    def clear_row(self, slot: int) -> None:
        """Forget the row in `slot`, its token counts included. Idempotent. Raises IndexError as `set_row`."""
        self._check_slot(slot)
        self.kind[slot] = 0
        self.edits.pop(slot, None)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.max_num_seqs:
            raise IndexError(f"slot {slot} is not in 0..{self.max_num_seqs - 1}")
