"""Every kernel set that runs here, and paged contexts to attend over."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Sequence

import torch

from models.batch import Batch
from models.ops.cpu import CpuKernels, load_extension
from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from models.ops.tiled import TiledKernels

ORACLE = ReferenceKernels(torch.float64)


def compiled() -> list[CpuKernels]:
    """One per instruction set that was built and runs here, the best last."""
    if load_extension() is None:
        return []
    found = []
    for name in reversed(importlib.import_module("models.ops._cpu_base").variants()):
        with contextlib.suppress(ImportError):
            found.append(CpuKernels(importlib.import_module(f"models.ops.{name}")))
    return found


COMPILED = compiled()
SERVING: list[Kernels] = [*COMPILED, TiledKernels()]


def as_multiplied(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x as a linear of `kernels` takes it: some round it to bf16 where it meets a bf16 weight."""
    rounds = isinstance(kernels, CpuKernels) and kernels.rounds_activations and weight.dtype is torch.bfloat16
    return x.bfloat16().to(x.dtype) if rounds else x


def name_of(value: object) -> str:
    """Test ids of kernel sets."""
    return str(getattr(value, "name", value))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells -0 from 0 and takes a NaN for itself."""
    integers = torch.int16 if a.itemsize == 2 else torch.int32
    return a.shape == b.shape and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    size: int


class Contexts:
    """Sequences of random q, k, v; keys and values stored in blocks dealt in a random order."""

    def __init__(
        self,
        kernels: Kernels,
        lengths: Sequence[int],
        heads: Heads,
        kv_dtype: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        deal: int = 0,
        stale: float = 0.0,
    ) -> None:
        """deal: seed of the order of blocks; stale: what lies in the cache before anything is stored."""
        generator = torch.Generator().manual_seed(5)
        self.kernels, self.heads, self.lengths, self.block_size = kernels, heads, list(lengths), block_size
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.size
        self.qkv = [torch.randn(length, width, generator=generator) * 2 for length in lengths]
        widths = [-(-length // block_size) for length in lengths]
        num_blocks = 1 + sum(widths)
        (self.kv,) = kernels.allocate_kv(1, num_blocks, block_size, heads.num_kv_heads, heads.size, kv_dtype)
        self.device = self.kv.key.device
        self.kv.key.fill_(stale)
        self.kv.value.fill_(stale)
        order = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(deal))
        ends = list(itertools.accumulate(widths))
        self.tables = [order[end - width : end].tolist() for end, width in zip(ends, widths, strict=True)]
        self.queries = [self._store(row) for row in range(len(self.lengths))]

    def _store(self, row: int) -> torch.Tensor:
        size = self.block_size
        slots = int32([self.tables[row][i // size] * size + i % size for i in range(self.lengths[row])])
        qkv = self.qkv[row].to(self.device, self.kernels.activation_dtype)
        slots, positions = slots.to(self.device), torch.arange(len(slots), dtype=torch.int32).to(self.device)
        heads = self.heads
        return self.kernels.rope_store(
            qkv, positions, None, self.kv, slots, heads.num_heads, heads.num_kv_heads, heads.size
        )

    def attend(
        self, plan: Sequence[tuple[int, int, int]], window: int = 0, num_padding: int = 0, softcap: float = 0.0
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(out, lse) of each (row, first query position, number of queries) of the plan, in one call."""
        heads = self.heads
        counts = [count for _, _, count in plan]
        width = max(len(table) for table in self.tables)
        tables = [self.tables[row] + [-1] * (width - len(self.tables[row])) for row, _, _ in plan]
        starts = list(itertools.accumulate(counts, initial=0))
        empty = int32([])
        batch = Batch(
            token_ids=empty,
            positions=empty,
            query_start_loc=int32(starts).to(self.device),
            seq_lens=int32([first + count for _, first, count in plan]).to(self.device),
            block_table=torch.tensor(tables, dtype=torch.int32).to(self.device),
            slot_mapping=empty,
            logits_indices=empty,
            max_query_len=max(counts),
            max_seq_len=max(first + count for _, first, count in plan),
        )
        q = torch.cat([self.queries[row][first : first + count] for row, first, count in plan])
        q = torch.cat((q, q.new_ones(num_padding, q.shape[1])))
        out, lse = self.kernels.attention(
            q, self.kv, batch, heads.num_heads, heads.num_kv_heads, heads.size, heads.size**-0.5, window, softcap
        )
        pieces = [*counts, num_padding] if num_padding else counts
        return list(zip(torch.split(out.cpu(), pieces), torch.split(lse.cpu(), pieces), strict=True))

    def whole(self, row: int, window: int = 0, softcap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Every query of a row in one call."""
        return self.attend([(row, 0, self.lengths[row])], window, softcap=softcap)[0]
