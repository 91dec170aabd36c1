"""Grouped-query self-attention over the paged cache (Ainslie et al. 2023)."""

from __future__ import annotations

import torch

from models.batch import Batch
from models.config import ModelConfig
from models.layers.linear import QKVParallel, RowParallel
from models.layers.loader import Loader
from models.ops.kernels import LayerKV


class Attention:
    """q, k, v of this rank's heads; rotary positions; causal attention; the output projection."""

    def __init__(self, loader: Loader, config: ModelConfig, cos_sin: torch.Tensor) -> None:
        """cos_sin: the model's rotary table, shared by its layers."""
        size, width, has_bias = config.head_size, config.hidden_size, config.attention_bias
        self.qkv_proj = QKVParallel(loader, width, config.num_heads, config.num_kv_heads, size, has_bias)
        own, _ = loader.group.heads(config.num_heads, config.num_kv_heads)
        columns = range(own.start * size, own.stop * size)
        self.o_proj = RowParallel(loader, "o_proj", width, columns, config.num_heads * size, has_bias)
        self.num_bytes = self.qkv_proj.num_bytes + self.o_proj.num_bytes
        self._cos_sin = cos_sin
        self._heads = (self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, size)
        self._scale = size**-0.5
        self._rope_store = loader.kernels.rope_store
        self._attention = loader.kernels.attention

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch, residual: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> residual [T, hidden] with the result added in place."""
        qkv = self.qkv_proj(x)
        q = self._rope_store(qkv, batch.positions, self._cos_sin, kv, batch.slot_mapping, *self._heads)
        out, _ = self._attention(q, kv, batch, *self._heads, self._scale)
        return self.o_proj(out, residual)
