"""Shares of the work: tensor-parallel groups and pipeline stages, always passed in (C11)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from models.config import ModelError


class TransportError(RuntimeError):
    """A peer has gone, is late or is elsewhere in the program; or the transport was closed. The gang is over."""


class Transport(Protocol):
    """Moves equal-shaped tensors among the ranks of a group. One thread uses it."""

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `x`, in rank order. The parts may be reused by the next call."""
        ...

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over the ranks, in place, as `sum_in_order` adds: the same bits on every rank (C4)."""
        ...

    def close(self) -> None:
        """Any thread: waits of this process end with TransportError."""
        ...


class Link(Protocol):
    """One way between neighbouring pipeline stages: from a rank to the rank of the same tensor-parallel place."""

    def send(self, x: torch.Tensor) -> None:
        """Hand over `x` [T, N]; it may be overwritten afterwards. Waits only while the link's slots are all unread."""
        ...

    def receive(self, shape: tuple[int, int]) -> torch.Tensor:
        """The next tensor, which must have `shape`. It is the caller's to overwrite."""
        ...

    def close(self) -> None:
        """Any thread: waits of this process end with TransportError."""
        ...


class Group:
    """The tensor-parallel ranks of a replica. Size 1 needs no transport and moves nothing."""

    def __init__(self, rank: int = 0, size: int = 1, transport: Transport | None = None) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to {size - 1}; got {rank}")
        if size > 1 and transport is None:
            raise ValueError(f"a group of {size} ranks needs a transport")
        self.rank = rank
        self.size = size
        self._transport = transport

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place; the same bits on every rank and in every run (C4)."""
        if self._transport is not None:
            self._transport.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[M, N] of every rank -> [M, size * N], in rank order."""
        if self._transport is None:
            return x
        return torch.cat(self._transport.all_gather(x), dim=-1)

    def share(self, total: int) -> range:
        """This rank's contiguous part of `total` items; parts differ by one at most."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def part(self, name: str, total: int) -> range:
        """`share` of the dimension `name`, of which every rank has some. Raises ModelError."""
        if total < self.size:
            raise ModelError(f"{name} {total} cannot be divided among {self.size} ranks")
        return self.share(total)

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[range, range]:
        """This rank's query heads and the KV heads that they read.

        With fewer KV heads than ranks, neighbouring ranks hold copies of one. Raises ModelError
        when the heads cannot be divided evenly.
        """
        if num_heads % self.size:
            raise ModelError(
                f"num_attention_heads {num_heads} cannot be divided among {self.size} ranks; "
                f"{_sizes(num_heads, num_kv_heads)} would do"
            )
        if num_kv_heads % self.size == 0:
            return self.share(num_heads), self.share(num_kv_heads)
        if self.size % num_kv_heads:
            raise ModelError(
                f"num_key_value_heads {num_kv_heads} cannot be divided among {self.size} ranks; "
                f"{_sizes(num_heads, num_kv_heads)} would do"
            )
        kv_head = self.rank * num_kv_heads // self.size
        return self.share(num_heads), range(kv_head, kv_head + 1)


def _sizes(num_heads: int, num_kv_heads: int) -> str:
    """The group sizes among which the heads can be divided."""
    sizes = [
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
    ]
    return ", ".join(map(str, sizes))


def sum_in_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """((parts[0] + parts[1]) + parts[2]) + … into `out`, whatever rank computes it."""
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class Stages:
    """This process's pipeline stage `index` of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"stage index must be from 0 to {self.count - 1}; got {self.index}")

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """The global indices of this stage's layers. Raises ModelError when a stage would be empty."""
        if num_layers < self.count:
            raise ModelError(f"num_hidden_layers {num_layers} cannot be divided among {self.count} stages")
        return range(num_layers * self.index // self.count, num_layers * (self.index + 1) // self.count)
