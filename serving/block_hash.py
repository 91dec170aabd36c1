"""Chained hashes of KV blocks (C8): blake2b-128 over the parent's hash and the block's token ids."""

from __future__ import annotations

from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
HASH_BYTES = 16


def root_hash(fingerprint: str, adapter: str, salt: bytes) -> BlockHash:
    """The parent of a request's first block. Different models, adapters or tenants never meet."""
    state = blake2b(digest_size=HASH_BYTES, person=b"argosy-kv-root")
    for part in (fingerprint.encode(), adapter.encode(), salt):
        state.update(len(part).to_bytes(4, "little"))
        state.update(part)
    return BlockHash(state.digest())


def block_hash(parent: BlockHash, token_bytes: bytes | memoryview) -> BlockHash:
    """Hash of one full block. token_bytes: its int32 token ids."""
    state = blake2b(parent, digest_size=HASH_BYTES)
    state.update(token_bytes)
    return BlockHash(state.digest())


def block_hashes(root: BlockHash, ids: bytes | memoryview, block_size: int, start: int = 0) -> list[BlockHash]:
    """Hashes of the full blocks in `ids` (int32 bytes), the first chained to `root`.

    start: index of the first block to hash; `root` is then the hash of block start - 1.
    """
    stride = 4 * block_size
    view = memoryview(ids)
    hashes: list[BlockHash] = []
    parent = root
    for at in range(start * stride, len(view) - stride + 1, stride):
        parent = block_hash(parent, view[at : at + stride])
        hashes.append(parent)
    return hashes
