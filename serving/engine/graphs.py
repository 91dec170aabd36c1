"""Steps as CUDA graphs: what launching their kernels costs the host is paid once, when they are recorded (C5).

There is a graph for each of a ladder of batch sizes in which every row decodes one token, and for each of a ladder of
numbers of tokens in steps that compute prompts, too. A step takes the next larger one. Padding writes to block 0, the
sink, and is sampled into a slot that nobody has. Everything that changes from step to step lies in buffers of fixed
places: attention does not ask for lengths when it is launched (`models/ops/triton_decode.py`), so a graph serves every
context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from models.batch import Batch
from models.kv_cache import KVCache
from models.ops.kernels import NUM_SAMPLING_FIELDS
from models.platform import host_buffer
from models.registry import CausalLM
from serving.engine.device_sampler import GREEDY, UNREAD, DeviceSampler
from serving.engine.request import Int32Array
from serving.engine.step_arrays import StepArrays

_T = TypeVar("_T")

_TOKEN, _POSITION, _PLACE, _TOKEN_SLOT = range(4)  # of tokens
_NUM_TOKEN_FIELDS = 4
_START, _LENGTH, _INDEX, _SLOT, _SAMPLING = range(5)  # of rows
_NUM_ROW_FIELDS = _SAMPLING + NUM_SAMPLING_FIELDS
_ALIGNMENT = 16  # int32s between fields, so that each begins where vector loads may
_LEAST_MIXED = 16  # tokens


def ladder(most: int, least: int = 1, per_octave: int = 4) -> list[int]:
    """Sizes from `least` to `most`, so many per doubling: the more, the less padding and the more graphs."""
    sizes, size = [], least
    while size < most:
        sizes.append(size)
        size += max(1, (1 << (size.bit_length() - 1)) // per_octave)
    return [*sizes, most]


class _Fields:
    """The inputs of a step as one array, on the host or on the device."""

    def __init__(self, memory: torch.Tensor, num_tokens: int, num_rows: int) -> None:
        """memory: int32 [size(num_tokens, num_rows)]."""
        self.memory = memory
        width = _aligned(num_tokens)
        self.tokens = memory[: _NUM_TOKEN_FIELDS * width].view(_NUM_TOKEN_FIELDS, width)
        self.rows = memory[_NUM_TOKEN_FIELDS * width :].view(_NUM_ROW_FIELDS, _aligned(num_rows + 1))

    @staticmethod
    def size(num_tokens: int, num_rows: int) -> int:
        return _NUM_TOKEN_FIELDS * _aligned(num_tokens) + _NUM_ROW_FIELDS * _aligned(num_rows + 1)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(slots=True)
class StepGraph:
    """Of one size. `fields` is written before `replay`, the results are there after it, until the next one."""

    num_tokens: int
    num_rows: int
    fields: _Fields
    logits: torch.Tensor  # float32 [num_rows, logits_size]
    tokens: torch.Tensor  # int32 [num_rows, 2]
    replay: Callable[[], None]


class StepGraphs:
    """All sizes. On a CPU there is nothing to record: what would be is computed, by the same padded batches."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        sampler: DeviceSampler,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        """Records them, which takes some 0.1 s each on a GPU. max_num_tokens: of a step with prompts."""
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._device = device
        width = -(-max_model_len // kv_cache.block_size)
        self._table = torch.zeros(max_num_seqs, width, dtype=torch.int32, device=device)
        self._rows_in_table: Int32Array = np.zeros(0, np.int32)
        self._width_in_table = 0
        self._pool: Any = None
        self._kept: list[torch.Tensor] = []
        # The largest first: the others find room in what it needed.
        mixed = ladder(max_num_tokens, _LEAST_MIXED, per_octave=2) if max_num_tokens > _LEAST_MIXED else []
        with torch.inference_mode():
            self._mixed = [self._make(size, max_num_seqs, is_decode=False) for size in reversed(mixed)][::-1]
            self._decode = [self._make(size, size, is_decode=True) for size in reversed(ladder(max_num_seqs))][::-1]

    @property
    def sizes(self) -> tuple[Sequence[int], Sequence[int]]:
        """Of decodes, in rows, and of mixtures, in tokens."""
        return [graph.num_rows for graph in self._decode], [graph.num_tokens for graph in self._mixed]

    def find(self, step: StepArrays) -> StepGraph | None:
        """The smallest that holds the step."""
        if step.is_decode:
            return next((graph for graph in self._decode if graph.num_rows >= len(step.slots)), None)
        return next((graph for graph in self._mixed if graph.num_tokens >= len(step.token_ids)), None)

    def run(
        self,
        graph: StepGraph,
        step: StepArrays,
        output_positions: Int32Array,
        tables: Int32Array,
        *,
        is_table_new: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue a step. Returns (logits, tokens as `triton_sampling.sample`) of its sampled rows, in their order.

        Token ids may be UNREAD: the slot's latest. output_positions: int32 [S], as in `Sampler`.
        tables: int32 [slots, blocks of a row], all slots'. is_table_new: it has changed since the last call.
        """
        num_tokens, num_rows, num_samples = len(step.token_ids), len(step.slots), len(step.sampled_slots)
        buffer = host_buffer(tuple(graph.fields.memory.shape), self._device)
        fields = _Fields(buffer, graph.num_tokens, graph.num_rows)
        tokens, rows = fields.tokens.numpy(), fields.rows.numpy()
        tokens[:, num_tokens:] = 0  # token 0 at position 0, written to the sink
        tokens[_TOKEN, :num_tokens] = step.token_ids
        tokens[_POSITION, :num_tokens] = step.positions
        tokens[_PLACE, :num_tokens] = step.places
        tokens[_TOKEN_SLOT, :num_tokens] = step.token_slots
        rows[:, num_samples:] = 0
        rows[_SAMPLING:, num_samples:] = GREEDY[:, None]  # anything else would cost time
        rows[_SLOT, num_samples:] = self._sampler.padding_slot
        rows[_SLOT, :num_samples] = step.sampled_slots
        rows[_INDEX, :num_samples] = step.logits_indices
        self._sampler.describe(step.sampled_slots, output_positions, rows[_SAMPLING:, :num_samples])
        rows[_START, : num_rows + 1] = step.query_start_loc
        rows[_LENGTH, :num_rows] = step.seq_lens
        # Padding rows of decodes have a token each, those of mixtures none.
        rows[_START, num_rows + 1 :] = num_tokens
        rows[_LENGTH, num_rows:] = 1
        graph.fields.memory.copy_(buffer, non_blocking=True)
        width = -(-step.max_seq_len // self._kv_cache.block_size)
        if is_table_new or width > self._width_in_table or not np.array_equal(step.slots, self._rows_in_table):
            self._upload_table(step.slots, tables, width)
        graph.replay()
        return graph.logits[:num_samples], graph.tokens[:num_samples]

    def _upload_table(self, slots: Int32Array, tables: Int32Array, width: int) -> None:
        buffer = host_buffer((len(slots), width), self._device)
        np.take(tables[:, :width], slots, axis=0, out=buffer.numpy())
        self._table[: len(slots), :width].copy_(buffer, non_blocking=True)
        self._rows_in_table, self._width_in_table = slots.copy(), width

    def _make(self, num_tokens: int, num_rows: int, *, is_decode: bool) -> StepGraph:
        memory = torch.zeros(_Fields.size(num_tokens, num_rows), dtype=torch.int32, device=self._device)
        fields = _Fields(memory, num_tokens, num_rows)
        fields.rows[_LENGTH] = 1
        fields.rows[_SLOT] = self._sampler.padding_slot
        fields.rows[_SAMPLING:] = torch.from_numpy(GREEDY).to(self._device).unsqueeze(1)
        ranges = torch.arange(num_rows + 1, dtype=torch.int32, device=self._device)
        if not is_decode:  # one row that has all tokens
            fields.rows[_START, 1:] = num_tokens
            fields.rows[_LENGTH, 0] = num_tokens

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            token_ids = fields.tokens[_TOKEN, :num_tokens]
            latest = self._sampler.latest.index_select(0, fields.tokens[_TOKEN_SLOT, :num_tokens])
            batch = Batch(
                token_ids=torch.where(token_ids == UNREAD, latest, token_ids),
                positions=fields.tokens[_POSITION, :num_tokens],
                query_start_loc=ranges if is_decode else fields.rows[_START, : num_rows + 1],
                seq_lens=fields.rows[_LENGTH, :num_rows],
                block_table=self._table[:num_rows],
                slot_mapping=fields.tokens[_PLACE, :num_tokens],
                logits_indices=ranges[:num_rows] if is_decode else fields.rows[_INDEX, :num_rows],
                max_query_len=1 if is_decode else num_tokens,
                max_seq_len=self._max_model_len,
            )
            logits = self._model.forward(batch, self._kv_cache)
            return logits, self._sampler.launch(logits, fields.rows[_SAMPLING:], fields.rows[_SLOT, :num_rows])

        logits, tokens = step()  # kernels are compiled and libraries are loaded before anything is recorded
        if self._device.type == "cpu":
            graph = StepGraph(num_tokens, num_rows, fields, logits, tokens, lambda: None)

            def recompute() -> None:
                graph.logits, graph.tokens = step()

            graph.replay = recompute
            return graph
        replay, (logits, tokens), self._pool = captured(step, self._pool)
        self._kept.append(ranges)  # a graph holds addresses, not tensors
        return StepGraph(num_tokens, num_rows, fields, logits, tokens, replay)


def captured(work: Callable[[], _T], pool: Any = None) -> tuple[Callable[[], None], _T, Any]:
    """`work`'s kernels as a graph: (replay, what `work` returned, the pool of memory that graphs may share).

    It must have run before: nothing may be compiled or loaded while it is recorded. Graphs that share a pool overwrite
    each other's results.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph.replay, result, graph.pool()
