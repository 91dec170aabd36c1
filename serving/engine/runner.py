"""A rank's half of a step: a plan in; sampled tokens out, or the residual stream to the next stage.

Rows persist here (token ids, block tables, sampling state); a plan changes them and names the
tokens to compute. Everything is vectorised over rows: no Python object per row on the hot path.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from models.batch import Batch
from models.kv_cache import KVCache
from models.ops.kernels import NUM_SAMPLING_FIELDS
from models.parallel import Link
from models.registry import CausalLM
from serving.engine.device_sampler import UNREAD, DeviceSampler, DeviceSamples
from serving.engine.graphs import StepGraphs
from serving.engine.plan import NO_IDS, Plan, decode_plan
from serving.engine.request import Int32Array
from serving.engine.sampler import NonFiniteLogits, Sampler
from serving.engine.sampling_rows import SamplingRows
from serving.engine.step_arrays import StepArrays, step_arrays

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


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class Computed:
    """A step that is over."""

    def __init__(self, value: StepResult) -> None:
        self._value = value

    def result(self) -> StepResult:
        return self._value


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
        samples_on_device: bool = False,
    ) -> None:
        """sampling: None on ranks that do not sample. before, after: to the neighbouring pipeline stages.

        samples_on_device: tokens stay there for the next step, and `submit` does not wait for them. Takes Triton.
        """
        self.model = model
        self.kv_cache = kv_cache
        self.busy_s = 0.0  # of the last step, without waiting for other stages
        self._before = before
        self._after = after
        self._sampling = sampling
        self._sampler = None if sampling is None else Sampler(sampling)
        self._device_sampler = DeviceSampler(sampling, device) if sampling is not None and samples_on_device else None
        self._graphs: StepGraphs | None = None
        self.use_graphs = True
        self._is_table_new = True
        self._last: _OnDevice | None = None
        self._block_size = block_size
        self._device = device
        self._tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._num_prompt = np.zeros(max_num_seqs, np.int32)
        # Unused entries name the sink: reading past a row's end is harmless and writing cannot happen.
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)

    def prepare(self, max_num_tokens: int, *, has_graphs: bool) -> None:
        """Have kernels compiled before the first request, and steps recorded as CUDA graphs.

        max_num_tokens: of a step. Nothing but the sink is written.
        """
        assert self._device_sampler is not None
        max_num_seqs, max_model_len = self._tokens.shape
        max_num_tokens = min(max_num_tokens, max_num_seqs * max_model_len)
        if has_graphs:
            self._graphs = StepGraphs(
                self.model,
                self.kv_cache,
                self._device_sampler,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_tokens=max_num_tokens,
                device=self._device,
            )
            return
        with torch.inference_mode():
            for count in sorted({min(n, max_num_tokens, max_model_len) for n in (1, 2, 300, max_num_tokens)}):
                self.model.forward(self._padding_batch(count), self.kv_cache)

    def run(self, words: Int32Array) -> StepResult:
        """Execute an encoded plan. The result holds no tokens on ranks that do not sample."""
        return self.submit(words).result()

    def submit(self, words: Int32Array) -> StepHandle:
        """Begin an encoded plan. Where the device samples, the next one may be submitted before its result is there."""
        started = time.perf_counter()
        plan = decode_plan(words)
        if self._device_sampler is not None:
            if self._last is not None and np.isin(plan.slots, self._last.slots_at_host).any():
                self._last.result()  # the host samples a row of it whose token this step may need
            self._apply(plan)
            with torch.inference_mode():
                self._last = self._submit_to_device(plan, self._device_sampler)
            return self._last
        self._apply(plan)
        with torch.inference_mode():
            step, hidden, waited = step_arrays(plan, self._tokens, self._tables, self._block_size), None, 0.0
            batch = self._batch(step)
            if self._before is not None:
                asked = time.perf_counter()
                hidden = self._before.receive((len(batch.token_ids), self.model.config.hidden_size))
                waited = time.perf_counter() - asked
            computed = self.model.forward(batch, self.kv_cache, hidden)
            result = self._sample(step, computed)
            self.busy_s = time.perf_counter() - started - waited
            if self._after is not None:
                self._after.send(computed)
        return Computed(result)

    def _submit_to_device(self, plan: Plan, sampler: DeviceSampler) -> _OnDevice:
        step = step_arrays(plan, self._tokens, self._tables, self._block_size)
        slots, ends = step.sampled_slots, step.ends
        positions = ends - self._num_prompt[slots]
        graph = self._graphs.find(step) if self._graphs is not None and self.use_graphs else None
        if self._graphs is not None and graph is not None:
            logits, tokens = self._graphs.run(graph, step, positions, self._tables, is_table_new=self._is_table_new)
            self._is_table_new = False
        else:
            logits = self.model.forward(self._batch(step), self.kv_cache)
            if len(slots):
                described = np.empty((NUM_SAMPLING_FIELDS, len(slots)), np.int32)
                sampler.describe(slots, positions, described)
                tokens = sampler.launch(logits, self._tensor(described), self._tensor(slots))
        if not len(slots):
            return _OnDevice(self, slots, ends, None)
        self._put(slots, ends, np.full(len(slots), UNREAD, np.int32))
        return _OnDevice(self, slots, ends, sampler.collect(logits, tokens, slots))

    def read(self, slots: Int32Array, ends: Int32Array, samples: DeviceSamples) -> StepResult:
        """Wait for what was sampled after `ends` tokens of `slots`; the host's rows are sampled now."""
        assert self._sampler is not None
        samples.wait()
        told: Int32Array = samples.tokens.numpy()
        ids: Int32Array = np.where(told[:, 1] == 0, told[:, 0], FAULTY).astype(np.int32)
        logprobs: Mapping[int, bytes] = {}
        at = samples.at_host
        if samples.logits is not None:
            result = self._sample_finite(
                self._sampler, samples.logits, slots[at], ends[at] - self._num_prompt[slots[at]]
            )
            ids[at] = result.ids
            logprobs = {int(at[i]): packed for i, packed in result.logprobs.items()}
        self._put(slots, ends, np.maximum(ids, 0))
        return StepResult(ids, logprobs)

    def _put(self, slots: Int32Array, ends: Int32Array, ids: Int32Array) -> None:
        """Know the tokens behind `ends`. A row may end at the last column; its last token is never an input."""
        fits = ends < self._tokens.shape[1]
        self._tokens[slots[fits], ends[fits]] = ids[fits]

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
        self._is_table_new |= len(plan.block_updates) > 0
        for slot, first, count in plan.block_updates.tolist():
            self._tables[slot, first : first + count] = plan.block_ids[at : at + count]
            at += count

    def _batch(self, step: StepArrays) -> Batch:
        tables = self._tables[step.slots, : -(-step.max_seq_len // self._block_size)]
        return Batch(
            token_ids=self._inputs(step.token_ids, step.token_slots),
            positions=self._tensor(step.positions),
            query_start_loc=self._tensor(step.query_start_loc),
            seq_lens=self._tensor(step.seq_lens),
            block_table=self._tensor(tables),
            slot_mapping=self._tensor(step.places),
            logits_indices=self._tensor(step.logits_indices),
            max_query_len=step.max_query_len,
            max_seq_len=step.max_seq_len,
        )

    def _sample(self, step: StepArrays, logits: torch.Tensor) -> StepResult:
        slots, ends = step.sampled_slots, step.ends
        if self._sampler is None or not len(slots):
            return StepResult(NO_IDS, {})
        logits = logits.cpu()  # where they are already, unless the model is on another device
        result = self._sample_finite(self._sampler, logits, slots, ends - self._num_prompt[slots])
        # A faulty row may have another step in flight: its input must be a token all the same.
        self._put(slots, ends, np.maximum(result.ids, 0))
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

    def _inputs(self, token_ids: Int32Array, slots: Int32Array) -> torch.Tensor:
        """int32 [T] on the device, where some may not have left it yet."""
        inputs = self._tensor(token_ids)
        if self._device_sampler is None or not (token_ids == UNREAD).any():
            return inputs
        return torch.where(inputs == UNREAD, self._device_sampler.latest[self._tensor(slots)], inputs)

    def _padding_batch(self, num_tokens: int) -> Batch:
        """One row of so many tokens, all of them in the sink."""
        ids = torch.zeros(num_tokens, dtype=torch.int32, device=self._device)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=self._device)
        return Batch(
            token_ids=ids,
            positions=ids,
            query_start_loc=starts,
            seq_lens=starts[1:],
            block_table=torch.zeros(1, self._tables.shape[1], dtype=torch.int32, device=self._device),
            slot_mapping=ids,
            logits_indices=starts[1:] - 1,
            max_query_len=num_tokens,
            max_seq_len=num_tokens,
        )

    def _tensor(self, values: Int32Array) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


class _OnDevice:
    """A step whose tokens come when they are asked for."""

    def __init__(self, runner: ModelRunner, slots: Int32Array, ends: Int32Array, samples: DeviceSamples | None) -> None:
        self.slots_at_host = slots[:0] if samples is None else slots[samples.at_host]
        self._runner = runner
        self._slots = slots
        self._ends = ends
        self._samples = samples
        self._result = StepResult(NO_IDS, {}) if samples is None else None

    def result(self) -> StepResult:
        if self._result is None:
            assert self._samples is not None
            self._result = self._runner.read(self._slots, self._ends, self._samples)
            self._samples, self.slots_at_host = None, self._slots[:0]
        return self._result
