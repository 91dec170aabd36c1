"""A rank's half of a step: a plan in; sampled tokens out, or the residual stream to the next stage.

Rows persist here (token ids, block tables, sampling state); a plan changes them and names the
tokens to compute. Everything is vectorised over rows: no Python object per row on the hot path.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import numpy as np
import torch

from models.batch import Batch
from models.kv_cache import KVCache
from models.parallel import Link
from models.registry import CausalLM
from serving.engine.plan import NO_IDS, Plan, decode_plan
from serving.engine.request import Int32Array
from serving.engine.sampler import NonFiniteLogits, Sampler
from serving.engine.sampling_rows import SamplingRows

FAULTY = -1
"""Instead of a token id."""


@dataclasses.dataclass(slots=True, frozen=True)
class StepResult:
    """ids: int32, one per sampled row in plan order; FAULTY where the model computed no usable logits.
    logprobs: by index into ids, packed as in wire.Step.
    busy_s: how long a pipeline's stages computed, all of them together; 0 = the time that passed says it."""

    ids: Int32Array
    logprobs: Mapping[int, bytes]
    busy_s: float = 0.0


class ModelRunner:
    """Runs plans on one rank."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        sampling: SamplingRows | None,
        *,
        before: Link | None = None,
        after: Link | None = None,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        """sampling: None on ranks that do not sample. before, after: to the neighbouring pipeline stages."""
        self.model = model
        self.kv_cache = kv_cache
        self.busy_s = 0.0  # of the last step, without waiting for other stages
        self._before = before
        self._after = after
        self._sampling = sampling
        self._sampler = None if sampling is None else Sampler(sampling)
        self._block_size = block_size
        self._device = device
        self._tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._num_prompt = np.zeros(max_num_seqs, np.int32)
        # Unused entries name the sink: reading past a row's end is harmless and writing cannot happen.
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)

    def run(self, words: Int32Array) -> StepResult:
        """Execute an encoded plan. The result holds no tokens on ranks that do not sample."""
        started = time.perf_counter()
        plan = decode_plan(words)
        self._apply(plan)
        with torch.inference_mode():
            batch, hidden, waited = self._batch(plan), None, 0.0
            if self._before is not None:
                asked = time.perf_counter()
                hidden = self._before.receive((len(batch.token_ids), self.model.config.hidden_size))
                waited = time.perf_counter() - asked
            computed = self.model.forward(batch, self.kv_cache, hidden)
            result = self._sample(plan, computed)
            self.busy_s = time.perf_counter() - started - waited
            if self._after is not None:
                self._after.send(computed)
        return result

    def _apply(self, plan: Plan) -> None:
        if self._sampling is not None:
            for slot in plan.finished.tolist():
                self._sampling.clear_row(slot)
        for row in plan.new_rows:
            self._tokens[row.slot, : len(row.tokens)] = row.tokens
            self._num_prompt[row.slot] = row.num_prompt
            prompt, outputs = row.tokens[: row.num_prompt], row.tokens[row.num_prompt :]
            if self._sampling is not None:
                self._sampling.set_row(row.slot, row.sampling, prompt, outputs)
        at = 0
        for slot, first, count in plan.block_updates.tolist():
            self._tables[slot, first : first + count] = plan.block_ids[at : at + count]
            at += count

    def _batch(self, plan: Plan) -> Batch:
        counts, starts = plan.num_tokens, plan.starts
        num_rows = len(counts)
        query_start_loc = np.zeros(num_rows + 1, np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        seq_lens = starts + counts
        max_query_len, max_seq_len = int(counts.max()), int(seq_lens.max())
        tables = self._tables[plan.slots, : -(-max_seq_len // self._block_size)]
        if max_query_len == 1:
            row_of, positions = np.arange(num_rows), starts
        else:
            row_of = np.repeat(np.arange(num_rows), counts)
            positions = np.arange(len(row_of), dtype=np.int32) + (starts - query_start_loc[:-1])[row_of]
        token_ids = plan.token_ids if len(plan.token_ids) else self._tokens[plan.slots[row_of], positions]
        slot_mapping = tables[row_of, positions // self._block_size] * self._block_size
        slot_mapping += positions % self._block_size
        return Batch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            query_start_loc=self._tensor(query_start_loc),
            seq_lens=self._tensor(seq_lens),
            block_table=self._tensor(tables),
            slot_mapping=self._tensor(slot_mapping),
            logits_indices=self._tensor(query_start_loc[1:][plan.num_samples > 0] - np.int32(1)),
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
        )

    def _sample(self, plan: Plan, logits: torch.Tensor) -> StepResult:
        is_sampled = plan.num_samples > 0
        slots = plan.slots[is_sampled]
        if self._sampler is None or not len(slots):
            return StepResult(NO_IDS, {})
        ends = (plan.starts + plan.num_tokens)[is_sampled]
        logits = logits.cpu()  # where they are already, unless the model is on another device
        result = self._sample_finite(self._sampler, logits, slots, ends - self._num_prompt[slots])
        # A row may end at the last column; its last token is never an input.
        fits = ends < self._tokens.shape[1]
        # A faulty row may have another step in flight: its input must be a token all the same.
        self._tokens[slots[fits], ends[fits]] = np.maximum(result.ids[fits], 0)
        return result

    def _sample_finite(
        self, sampler: Sampler, logits: torch.Tensor, slots: Int32Array, positions: Int32Array
    ) -> StepResult:
        try:
            sampled = sampler.sample(logits, slots, positions)
            return StepResult(sampled.ids, sampled.logprobs or {})
        except NonFiniteLogits as garbage:
            sound = np.flatnonzero(~np.isin(slots, garbage.slots))
        # The sound rows of the step must not pay for the others.
        ids = np.full(len(slots), FAULTY, np.int32)
        if not len(sound):
            return StepResult(ids, {})
        sampled = sampler.sample(logits[torch.from_numpy(sound)], slots[sound], positions[sound])
        ids[sound] = sampled.ids
        return StepResult(ids, {int(sound[at]): packed for at, packed in (sampled.logprobs or {}).items()})

    def _tensor(self, values: Int32Array) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)
