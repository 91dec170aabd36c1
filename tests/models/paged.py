"""Sequences whose keys and values lie in blocks dealt in random order, and the batches made of them."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence

import torch

from models.batch import Batch
from models.kv_cache import KVCache
from models.parallel import Group
from models.registry import CausalLM

BLOCK_SIZE = 16


@contextlib.contextmanager
def inference_on_one_thread() -> Iterator[None]:
    """Tiny matrices on several threads are mostly waiting, for minutes on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(num_threads)


class Sequences:
    """Advances token sequences by any number of tokens per step and keeps all their logits."""

    def __init__(
        self,
        model: CausalLM,
        tokens: Sequence[torch.Tensor],
        kv_dtype: torch.dtype,
        seed: int = 0,
        group: Group | None = None,
    ) -> None:
        """tokens: int64 [length] of every sequence."""
        self.model = model
        self.tokens = list(tokens)
        self.num_computed = [0] * len(tokens)
        self.logits: list[list[torch.Tensor]] = [[] for _ in tokens]
        widths = [-(-len(ids) // BLOCK_SIZE) for ids in tokens]
        num_blocks = 1 + sum(widths)
        self.kv_cache = KVCache(model.config, model.kernels, num_blocks, BLOCK_SIZE, kv_dtype, group=group)
        order = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed))
        self.block_tables = list(torch.split(order, widths))

    def step(self, plan: Sequence[tuple[int, int]]) -> None:
        """One forward pass over (sequence, number of tokens) rows, in that order."""
        batch = self.batch(plan)
        logits = self.model.forward(batch, self.kv_cache)
        start = 0
        for sequence, count in plan:
            self.logits[sequence].append(logits[start : start + count].clone())
            self.num_computed[sequence] += count
            start += count

    def all_logits(self, sequence: int) -> torch.Tensor:
        """[computed tokens, vocab_size]."""
        return torch.cat(self.logits[sequence])

    def batch(self, plan: Sequence[tuple[int, int]]) -> Batch:
        """As the runner makes them: a lone token is computed alone (C4)."""
        token_ids, positions, slots, counts, seq_lens, tables = [], [], [], [], [], []
        for sequence, count in plan:
            start = self.num_computed[sequence]
            where = torch.arange(start, start + count)
            table = self.block_tables[sequence]
            token_ids.append(self.tokens[sequence][where])
            positions.append(where)
            slots.append(table[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE)
            counts.append(count)
            seq_lens.append(start + count)
            tables.append(table)
        width = max(len(table) for table in tables)
        block_table = torch.full((len(tables), width), -1)
        for row, table in enumerate(tables):
            block_table[row, : len(table)] = table
        starts = list(itertools.accumulate(counts, initial=0))
        return Batch(
            token_ids=torch.cat(token_ids).int(),
            positions=torch.cat(positions).int(),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=block_table.int(),
            slot_mapping=torch.cat(slots).int(),
            logits_indices=torch.arange(starts[-1], dtype=torch.int32),
            max_query_len=max(counts),
            max_seq_len=max(seq_lens),
        )


def advance_at_random(sequences: Sequences, chance: random.Random, max_count: int) -> None:
    """Steps of random rows of random lengths until every sequence is computed."""
    while True:
        left = [(i, len(ids) - sequences.num_computed[i]) for i, ids in enumerate(sequences.tokens)]
        unfinished = [(i, count) for i, count in left if count]
        if not unfinished:
            return
        rows = chance.sample(unfinished, chance.randint(1, len(unfinished)))
        sequences.step([(i, chance.randint(1, min(count, chance.choice((1, max_count))))) for i, count in rows])
