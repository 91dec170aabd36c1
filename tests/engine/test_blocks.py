"""The pool of KV blocks against a model that forgets nothing."""

from __future__ import annotations

import random

import pytest

from serving.block_hash import BlockHash
from serving.engine.blocks import SINK, BlockPool


def key(name: int) -> BlockHash:
    return BlockHash(name.to_bytes(16, "little"))


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_conserve_blocks_and_never_mix_contents(seed: int) -> None:
    """content[block] is what its owner wrote: whoever finds a block by its hash must find that."""
    rng = random.Random(seed)
    pool = BlockPool(rng.choice([2, 5, 30]))
    tables: list[list[int]] = []
    content: dict[int, int] = {}
    names = iter(range(1, 10**9))
    for _ in range(3000):
        action = rng.random()
        if action < 0.4 and pool.num_free:
            blocks = pool.allocate(rng.randint(1, pool.num_free))
            assert SINK not in blocks
            content.update({block: next(names) for block in blocks})
            tables.append(blocks)
        elif action < 0.6 and tables:
            for block in rng.choice(tables):
                pool.commit(block, key(content[block]))
        elif action < 0.8 and content:
            wanted = rng.sample(sorted(content.values()), min(3, len(content)))
            found = pool.match(map(key, wanted))
            assert [content[block] for block in found] == wanted[: len(found)]
            pool.acquire(found)
            tables.append(found)
        elif action < 0.85 and tables:
            tainted = rng.choice(tables)
            pool.disown(tainted)
            assert pool.match([key(content[block]) for block in tainted[:1]]) == []
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
        assert pool.num_owned + pool.num_free == pool.num_blocks - 1
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.num_owned == 0


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(7)
    old, new = pool.allocate(3), pool.allocate(3)
    for name, block in enumerate(old + new):
        pool.commit(block, key(name))
    pool.release(old)
    pool.release(new)
    assert pool.allocate(2) == [old[2], old[1]]
    assert pool.match([key(0)]) == [old[0]] and pool.match([key(1)]) == []
    assert pool.match([key(3), key(4), key(5)]) == new


def test_more_than_there_is_changes_nothing() -> None:
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="5 blocks asked, 3 free"):
        pool.allocate(5)
    pool.check([])
    block = pool.allocate(1)
    pool.release(block)
    with pytest.raises(ValueError, match="released more often"):
        pool.release(block)
