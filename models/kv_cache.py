"""Keys and values of every layer in fixed-size blocks (C8; PagedAttention, Kwon et al. 2023)."""

from __future__ import annotations

import torch

from models.config import ModelConfig
from models.ops.kernels import Kernels, LayerKV
from models.parallel import Group, Stages


class KVCache:
    """This rank's share: the KV heads of its group rank in the layers of its stage.

    `layers` is keyed by global layer index; layers of other stages are None. Block ids run from 0
    to `num_blocks` - 1, and block 0 is the write sink of padding rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        stages: Stages | None = None,
        group: Group | None = None,
    ) -> None:
        """Allocate zeroed blocks. Raises ValueError when there is no block beside the write sink."""
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (block 0 takes padding writes); got {num_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.layers: list[LayerKV | None] = [None] * config.num_layers
        own = (stages or Stages()).layers(config.num_layers)
        num_kv_heads = _num_kv_heads(config, group or Group())
        allocated = kernels.allocate_kv(len(own), num_blocks, block_size, num_kv_heads, config.head_size, dtype)
        self.layers[own.start : own.stop] = allocated

    @property
    def num_bytes(self) -> int:
        return sum(kv.key.nbytes + kv.value.nbytes for kv in self.layers if kv is not None)


def bytes_per_token(
    config: ModelConfig, dtype: torch.dtype, stages: Stages | None = None, group: Group | None = None
) -> int:
    """Bytes of keys and values that one token occupies on this rank."""
    num_layers = len((stages or Stages()).layers(config.num_layers))
    return 2 * num_layers * _num_kv_heads(config, group or Group()) * config.head_size * dtype.itemsize


def bytes_per_block(
    config: ModelConfig,
    dtype: torch.dtype,
    block_size: int,
    stages: Stages | None = None,
    group: Group | None = None,
) -> int:
    """Bytes of one block of `block_size` tokens on this rank."""
    return block_size * bytes_per_token(config, dtype, stages, group)


def _num_kv_heads(config: ModelConfig, group: Group) -> int:
    return len(group.heads(config.num_heads, config.num_kv_heads)[1])
