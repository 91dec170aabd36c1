"""Steps in which every row decodes one token, as CUDA graphs: what launching their kernels costs is paid once (C5).

A graph is recorded for each of a ladder of batch sizes; a batch takes the next larger one, whose padding rows write to
block 0, the sink. Everything that changes from step to step lies in buffers of fixed places. Attention does not
ask for lengths when it is launched (`models/ops/triton_decode.py`), so one graph serves every context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from models.batch import Batch
from models.kv_cache import KVCache
from models.ops.kernels import NUM_SAMPLING_FIELDS
from models.platform import host_buffer
from models.registry import CausalLM
from serving.engine.device_sampler import UNREAD, DeviceSampler
from serving.engine.request import Int32Array

_T = TypeVar("_T")

_TOKEN, _POSITION, _LENGTH, _PLACE, _SLOT, _SAMPLING = range(6)
_NUM_FIELDS = _SAMPLING + NUM_SAMPLING_FIELDS
_ALIGNMENT = 16  # int32s between fields, so that each begins where vector loads may


def ladder(max_num_rows: int) -> list[int]:
    """Batch sizes with graphs: padding stays below a quarter of a batch, but for the smallest."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_rows:
        size = sizes[-1]
        sizes.append(size + max(4, 1 << (size.bit_length() - 3)))
    return sorted({min(size, max_num_rows) for size in sizes})


@dataclasses.dataclass(slots=True)
class DecodeGraph:
    """Of one batch size. `fields` is written before `replay`, the results are there after it, until the next one."""

    size: int
    fields: torch.Tensor  # int32 [_NUM_FIELDS, size or more]
    logits: torch.Tensor  # float32 [size, logits_size]
    tokens: torch.Tensor  # int32 [size, 2]
    replay: Callable[[], None]


class DecodeGraphs:
    """All sizes. On a CPU there is nothing to record: what would be is computed, by the same padded batches."""

    def __init__(
        self,
        model: CausalLM,
        kv_cache: KVCache,
        sampler: DeviceSampler,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """Records them: takes some 0.1 s each on a GPU."""
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._block_size = kv_cache.block_size
        self._max_model_len = max_model_len
        self._device = device
        width = -(-max_model_len // self._block_size)
        self._table = torch.zeros(max_num_seqs, width, dtype=torch.int32, device=device)
        # Kept: a graph holds addresses, not tensors.
        self._ranges = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._rows_in_table: Int32Array = np.zeros(0, np.int32)
        self._width_in_table = 0
        self._pool: Any = None
        with torch.inference_mode():
            made = [self._make(size) for size in reversed(ladder(max_num_seqs))]  # what the largest needs does for all
        self._graphs = {graph.size: graph for graph in made}
        self._sizes: npt.NDArray[np.int64] = np.array(sorted(self._graphs))

    @property
    def sizes(self) -> Sequence[int]:
        return [int(size) for size in self._sizes]

    def run(
        self,
        slots: Int32Array,
        token_ids: Int32Array,
        positions: Int32Array,
        output_positions: Int32Array,
        tables: Int32Array,
        *,
        is_table_new: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue a step; all rows are sampled. Returns (logits, tokens as `triton_sampling.sample`) of its rows.

        slots, token_ids (UNREAD = the slot's latest), positions: int32 [R]. output_positions: as in `Sampler`.
        tables: int32 [slots, blocks of a row], all slots'. is_table_new: it has changed since the last call.
        """
        num_rows = len(slots)
        graph = self._graphs[int(self._sizes[self._sizes.searchsorted(num_rows)])]
        buffer = host_buffer(tuple(graph.fields.shape), self._device)
        fields: Int32Array = buffer.numpy()
        fields[:, num_rows:] = 0  # padding: token 0 at position 0, written to the sink, chosen greedily
        fields[_LENGTH, num_rows:] = 1
        fields[_SLOT, num_rows:] = self._sampler.padding_slot
        fields[_TOKEN, :num_rows] = token_ids
        fields[_POSITION, :num_rows] = positions
        fields[_LENGTH, :num_rows] = positions + 1
        blocks = tables[slots, positions // self._block_size]
        fields[_PLACE, :num_rows] = blocks * self._block_size + positions % self._block_size
        fields[_SLOT, :num_rows] = slots
        self._sampler.describe(slots, output_positions, fields[_SAMPLING:, :num_rows])
        graph.fields.copy_(buffer, non_blocking=True)
        width = int(positions.max()) // self._block_size + 1
        if is_table_new or width > self._width_in_table or not np.array_equal(slots, self._rows_in_table):
            self._upload_table(slots, tables, width)
        graph.replay()
        return graph.logits[:num_rows], graph.tokens[:num_rows]

    def _upload_table(self, slots: Int32Array, tables: Int32Array, width: int) -> None:
        buffer = host_buffer((len(slots), width), self._device)
        np.take(tables[:, :width], slots, axis=0, out=buffer.numpy())
        self._table[: len(slots), :width].copy_(buffer, non_blocking=True)
        self._rows_in_table, self._width_in_table = slots.copy(), width

    def _make(self, size: int) -> DecodeGraph:
        stride = -(-size // _ALIGNMENT) * _ALIGNMENT
        fields = torch.zeros(_NUM_FIELDS, stride, dtype=torch.int32, device=self._device)
        fields[_LENGTH] = 1
        fields[_SLOT] = self._sampler.padding_slot
        ranges = self._ranges[: size + 1]

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            token_ids, slots = fields[_TOKEN, :size], fields[_SLOT, :size]
            latest = self._sampler.latest.index_select(0, slots)
            batch = Batch(
                token_ids=torch.where(token_ids == UNREAD, latest, token_ids),
                positions=fields[_POSITION, :size],
                query_start_loc=ranges,
                seq_lens=fields[_LENGTH, :size],
                block_table=self._table[:size],
                slot_mapping=fields[_PLACE, :size],
                logits_indices=ranges[:size],
                max_query_len=1,
                max_seq_len=self._max_model_len,
            )
            logits = self._model.forward(batch, self._kv_cache)
            return logits, self._sampler.launch(logits, fields[_SAMPLING:], slots)

        logits, tokens = step()  # kernels are compiled and libraries are loaded before anything is recorded
        if self._device.type == "cpu":
            graph = DecodeGraph(size, fields, logits, tokens, lambda: None)

            def recompute() -> None:
                graph.logits, graph.tokens = step()

            graph.replay = recompute
            return graph
        replay, (logits, tokens), self._pool = captured(step, self._pool)
        return DecodeGraph(size, fields, logits, tokens, replay)


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
