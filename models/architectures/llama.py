"""Llama 2 and 3 and what shares their block: SmolLM2, TinyLlama, … (Touvron et al. 2023)."""

from __future__ import annotations

import torch

from models.batch import Batch
from models.config import ModelConfig, ModelError
from models.kv_cache import KVCache
from models.layers.attention import Attention
from models.layers.embedding import LMHead, VocabParallelEmbedding
from models.layers.loader import Loader
from models.layers.mlp import GatedMLP
from models.layers.norm import RMSNorm
from models.layers.rotary import cos_sin_table
from models.ops.kernels import LayerKV
from models.parallel import Stages

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class LlamaBlock:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, loader: Loader, config: ModelConfig, cos_sin: torch.Tensor) -> None:
        self.attention_norm = RMSNorm(loader, "input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(loader.at("self_attn"), config, cos_sin)
        self.mlp_norm = RMSNorm(loader, "post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(loader.at("mlp"), config)
        self.num_bytes = sum(part.num_bytes for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp))

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        """The residual stream x [T, hidden], changed in place."""
        x = self.attention(self.attention_norm(x), kv, batch, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class LlamaForCausalLM:
    """Parts that belong to other pipeline stages are None; `blocks` is keyed by global index (C11)."""

    def __init__(self, loader: Loader, config: ModelConfig, stages: Stages, max_model_len: int) -> None:
        """Load this rank's share through `loader`. Raises ModelError naming the tensor that is wrong."""
        self.config = config
        self.kernels = loader.kernels
        self.stages = stages
        self.weight_dtype = loader.dtype
        self.logits_size = config.vocab_size
        vocabulary = (config.vocab_size, config.hidden_size)
        cos_sin = cos_sin_table(config, max_model_len, loader.device)
        self._own_layers = stages.layers(config.num_layers)

        self.embedding = VocabParallelEmbedding(loader, EMBEDDING, *vocabulary) if stages.is_first else None
        self.blocks: list[LlamaBlock | None] = [None] * config.num_layers
        for i in range(config.num_layers):
            layer = loader.at(f"model.layers.{i}")
            loader.reader.skip(f"{layer.prefix}self_attn.rotary_emb.")  # a buffer that old exports hold
            if i in self._own_layers:
                self.blocks[i] = self.block(layer, config, cos_sin)
            else:
                loader.reader.skip(layer.prefix)
        self.norm = RMSNorm(loader, NORM, config.hidden_size, config.rms_norm_eps) if stages.is_last else None
        head = EMBEDDING if config.tie_word_embeddings else HEAD
        self.head = LMHead(loader, head, *vocabulary) if stages.is_last else None
        for name in self._elsewhere():
            loader.reader.skip(f"{name}.")

        self.num_parameters = loader.reader.num_parameters
        parts = (*self.blocks, self.norm, self.head)
        self.weight_bytes = sum(part.num_bytes for part in parts if part is not None)

    block = LlamaBlock  # an architecture that differs in its block states only that

    def forward(self, batch: Batch, kv_cache: KVCache, hidden_in: torch.Tensor | None = None) -> torch.Tensor:
        """Compute one step and write its keys and values.

        hidden_in: the previous stage's result, [T, hidden]; it may be overwritten. The first stage
            takes none.
        Returns float32 logits [S, vocab_size] of the tokens in batch.logits_indices, or, before the
        last stage, the residual stream [T, hidden].
        """
        if self.embedding is not None:
            x = self.embedding(batch.token_ids)
        elif hidden_in is not None:
            x = hidden_in
        else:
            raise ValueError("hidden_in is required: this stage does not hold the embedding")
        for i in self._own_layers:
            block, kv = self.blocks[i], kv_cache.layers[i]
            if block is None or kv is None:
                raise ModelError(f"layer {i} has no KV cache: it was allocated for another pipeline stage")
            x = block(x, kv, batch)
        if self.norm is None or self.head is None:
            return x
        return self.head(self.norm(x.index_select(0, batch.logits_indices)))

    def _elsewhere(self) -> list[str]:
        """Names of this model's tensors that this stage leaves unread."""
        names = [HEAD] if self.config.tie_word_embeddings else []  # some exports store the tied copy too
        if not self.stages.is_first:
            names.append(EMBEDDING)
        if not self.stages.is_last:
            names += [NORM, HEAD]
        return names
