"""Grouped-query self-attention over the paged cache (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.batch import Batch
from models.config import ModelConfig
from models.layers.linear import ColumnParallel, RowParallel, separate_qkv
from models.layers.loader import Loader
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV
from models.quant.method import WeightPart


class Attention:
    """q, k, v of this rank's heads; rotary positions; causal attention; the output projection."""

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig,
        layer: int,
        rotary: RotaryTables,
        *,
        qkv: Sequence[WeightPart] | None = None,
        output: str = "o_proj",
        head_norms: tuple[torch.Tensor, torch.Tensor] | None = None,
        is_transposed: bool = False,
    ) -> None:
        """layer: global index, which decides the window and the rotary table.

        qkv: this rank's rows of the projections (see `separate_qkv`); None = q_proj, k_proj and v_proj.
        output: name of the output projection; is_transposed: whether it is stored as [in, out].
        head_norms: weights [head_size] of q's and k's norms where config.has_head_norm.
        """
        size, width = config.head_size, config.hidden_size
        heads, kv_heads = loader.group.heads(config.num_heads, config.num_kv_heads)
        self.qkv_proj = ColumnParallel(loader, qkv or separate_qkv(loader.group, config), config.has_qkv_bias)
        columns = range(heads.start * size, heads.stop * size)
        self.o_proj = RowParallel(
            loader, output, width, columns, config.num_heads * size, config.has_output_bias, is_transposed
        )
        self.num_bytes = self.qkv_proj.num_bytes + self.o_proj.num_bytes
        self.num_bytes += sum(weight.nbytes for weight in head_norms or ())
        self._cos_sin = rotary.of_layer(layer)
        self._heads = (len(heads), len(kv_heads), size)
        self._head_norms = (*(head_norms or (None, None)), config.norm_eps)
        self._score = (config.scale, config.window(layer), config.attention_softcap)
        self._rope_store = loader.kernels.rope_store
        self._attention = loader.kernels.attention

    def __call__(
        self, x: torch.Tensor, kv: LayerKV, batch: Batch, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, hidden] -> residual [T, hidden] with the result added in place; without one, the result."""
        qkv = self.qkv_proj(x)
        q = self._rope_store(
            qkv, batch.positions, self._cos_sin, kv, batch.slot_mapping, *self._heads, *self._head_norms
        )
        out, _ = self._attention(q, kv, batch, *self._heads, *self._score)
        return self.o_proj(out, residual)
