"""KV blocks: who owns which, and which finished ones still hold a reusable prefix (C8).

Every block but the sink (block 0) is in exactly one place:

    fresh      free, content worthless           (stack)
    evictable  free, content reusable by hash    (least recently used first)
    owned      reference count >= 1              (one per row whose table names it)

    fresh + evictable + owned == num_blocks - 1          checked by `check`

Only full blocks of completed steps are ever committed to the hash index, so that whoever finds a
block by its hash may read all of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from serving.block_hash import BlockHash

SINK = 0
"""Padding tokens write their keys and values here; it is never read."""


class BlockPool:
    """All KV blocks of a replica. Pure bookkeeping: knows neither tensors nor rows."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one is the sink), got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_evicted = 0  # since the start
        self._fresh = list(range(num_blocks - 1, SINK, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, evicting if need be."""
        return len(self._fresh) + len(self._evictable)

    @property
    def num_owned(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` blocks owned by the caller, content undefined; the least recently used prefixes go first.

        Raises ValueError when fewer than `count` are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked, {self.num_free} free")
        blocks = []
        for _ in range(count):
            if self._fresh:
                block = self._fresh.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                self._forget(block)
                self.num_evicted += 1
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Blocks that hold the longest known prefix of `hashes`. They are not acquired yet."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_evictable_in(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` acquiring would take out of the free ones."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more owner for each block that `match` returned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1

    def commit(self, block: int, key: BlockHash) -> None:
        """`block` is full and its step complete: later prompts may share it.

        When another block already holds the same content, this one stays private to its row.
        """
        if key not in self._block_of and self._hash_of[block] is None:
            self._block_of[key] = block
            self._hash_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. Last blocks first, so that a prefix outlives its continuations."""
        for block in reversed(blocks):
            references = self._references[block] - 1
            if references < 0:
                raise ValueError(f"block {block} released more often than acquired")
            self._references[block] = references
            if references == 0:
                if self._hash_of[block] is None:
                    self._fresh.append(block)
                else:
                    self._evictable[block] = None

    def disown(self, blocks: Iterable[int]) -> None:
        """The content of these owned blocks is not to be trusted: nobody else shall find them."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert the conservation law against the block tables of all rows (tests, and when idle)."""
        references = [0] * self.num_blocks
        for table in owned:
            for block in table:
                references[block] += 1
        assert references[SINK] == 0, "the sink is owned"
        assert references == self._references, "reference counts differ from the block tables"
        free = [*self._fresh, *self._evictable]
        assert len(free) == len(set(free)), "a block is free twice"
        assert all(references[block] == 0 for block in free), "a free block is owned"
        num_owned = sum(1 for count in references if count)
        assert len(free) + num_owned == self.num_blocks - 1, "blocks are lost"
        assert all(self._block_of[key] == block for block, key in enumerate(self._hash_of) if key is not None)
        assert len(self._block_of) == sum(1 for key in self._hash_of if key is not None)
        assert all(self._hash_of[block] is not None for block in self._evictable)
        assert all(self._hash_of[block] is None for block in self._fresh)
