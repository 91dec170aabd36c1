"""Llama 2 and 3 and what shares their block: SmolLM2, TinyLlama, … (Touvron et al. 2023)."""

from __future__ import annotations

import torch

from models.batch import Batch
from models.config import ModelConfig
from models.decoder import Decoder
from models.fields import Fields
from models.layers.attention import Attention
from models.layers.loader import Loader
from models.layers.mlp import FeedForward, GatedMLP
from models.layers.norm import RMSNorm, head_norms
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV


class LlamaBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)). With config.has_head_norm it is Qwen3's."""

    def __init__(self, loader: Loader, config: ModelConfig, layer: int, rotary: RotaryTables) -> None:
        self.attention_norm = RMSNorm(loader, "input_layernorm", config.hidden_size, config.norm_eps)
        attention = loader.at("self_attn")
        norms = head_norms(attention, config.head_size) if config.has_head_norm else None
        self.attention = Attention(attention, config, layer, rotary, head_norms=norms)
        self.mlp_norm = RMSNorm(loader, "post_attention_layernorm", config.hidden_size, config.norm_eps)
        self.mlp = self.load_mlp(loader, config, layer)
        self.num_bytes = sum(part.num_bytes for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp))

    def load_mlp(self, loader: Loader, config: ModelConfig, layer: int) -> FeedForward:
        """`loader` is scoped to the block."""
        return GatedMLP(loader.at("mlp"), config)

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        x = self.attention(self.attention_norm(x), kv, batch, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class LlamaForCausalLM(Decoder):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        heads = fields.heads()
        has_bias = fields.flag("attention_bias")
        rotary = fields.rotary(heads["head_size"])
        return ModelConfig(
            model_type=fields.text("model_type"),
            **heads,
            num_layers=fields.num_layers(),
            intermediate_size=fields.size("intermediate_size"),
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("rms_norm_eps", 1e-6),
            activation=fields.activation("hidden_act", "silu", ("silu",)),
            rotary=rotary,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            has_mlp_bias=fields.flag("mlp_bias"),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            max_position_embeddings=fields.max_positions(rotary, 2048),
            **fields.special_tokens(bos_token_id=1, eos_token_id=2),
        )

    def load_block(self, loader: Loader, layer: int) -> LlamaBlock:
        return LlamaBlock(loader, self.config, layer, self.rotary)
