"""Block hashes chain, so equal hashes mean equal prefixes of equal tenants of equal models (C8)."""

from __future__ import annotations

import random

import pytest

from serving.block_hash import HASH_BYTES, block_hash, block_hashes, root_hash
from serving.wire import pack_ids

ROOT = root_hash("fingerprint", "", b"salt")


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("num_full", [0, 1, 3])
def test_only_full_blocks_are_hashed(block_size: int, num_full: int) -> None:
    for extra in {0, 1, block_size - 1} - {block_size}:
        ids = pack_ids(range(num_full * block_size + extra))
        assert len(block_hashes(ROOT, ids, block_size)) == num_full + (extra == block_size)


def test_each_hash_is_chained_to_the_one_before() -> None:
    ids = pack_ids(range(48))
    first, second, third = block_hashes(ROOT, ids, 16)
    assert first == block_hash(ROOT, ids[:64])
    assert second == block_hash(first, ids[64:128])
    assert third == block_hash(second, ids[128:])
    assert {len(value) for value in (ROOT, first, second, third)} == {HASH_BYTES}


@pytest.mark.parametrize("seed", range(5))
def test_growing_from_any_block_equals_hashing_at_once(seed: int) -> None:
    rng = random.Random(seed)
    ids = pack_ids(rng.randrange(50_000) for _ in range(rng.randrange(16, 200)))
    whole = block_hashes(ROOT, ids, 16)
    for start in range(1, len(whole) + 1):
        assert block_hashes(whole[start - 1], ids, 16, start) == whole[start:]
    assert block_hashes(ROOT, memoryview(ids), 16) == whole


@pytest.mark.parametrize("changed", [0, 15, 16, 40, 63])
def test_one_token_changes_its_block_and_all_later_ones(changed: int) -> None:
    ids = list(range(64))
    before = block_hashes(ROOT, pack_ids(ids), 16)
    ids[changed] += 1
    after = block_hashes(ROOT, pack_ids(ids), 16)
    block = changed // 16
    assert after[:block] == before[:block]
    assert not set(after[block:]) & set(before)


def test_equal_tokens_at_different_depths_differ() -> None:
    hashes = block_hashes(ROOT, pack_ids([7] * 64), 16)
    assert len(set(hashes)) == 4


def test_models_adapters_and_tenants_never_meet() -> None:
    """Also where their concatenations are equal: every part is length-prefixed."""
    parts = [
        ("ab", "c", b""),
        ("a", "bc", b""),
        ("abc", "", b""),
        ("", "abc", b""),
        ("", "", b"abc"),
        ("ab", "", b"c"),
        ("", "", b""),
        ("", "", b"\0"),
    ]
    roots = [root_hash(*part) for part in parts]
    assert len(set(roots)) == len(parts)
    first_blocks = [block_hash(root, pack_ids(range(16))) for root in roots]
    assert not set(first_blocks) & set(roots)
    assert len(set(first_blocks)) == len(parts)


def test_golden_values() -> None:
    """Blocks are shared between processes and versions by these bytes."""
    assert ROOT.hex() == "c2386dfa31208c046010d56e61f0efb5"
    assert block_hash(ROOT, pack_ids(range(16))).hex() == "9c4729666e166a4c25f6c24b131d734f"
