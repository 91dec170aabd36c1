"""Llama 2 and 3 and what shares their block: SmolLM2, TinyLlama, … (Touvron et al. 2023)."""

from __future__ import annotations

import torch

from models.batch import Batch
from models.config import ModelConfig
from models.decoder import Decoder
from models.fields import Fields
from models.layers.attention import Attention
from models.layers.loader import Loader
from models.layers.mlp import GatedMLP
from models.layers.norm import RMSNorm
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV


class LlamaBlock:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, loader: Loader, config: ModelConfig, layer: int, rotary: RotaryTables) -> None:
        self.attention_norm = RMSNorm(loader, "input_layernorm", config.hidden_size, config.norm_eps)
        self.attention = Attention(loader.at("self_attn"), config, layer, rotary)
        self.mlp_norm = RMSNorm(loader, "post_attention_layernorm", config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(loader.at("mlp"), config)
        self.num_bytes = sum(part.num_bytes for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp))

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        x = self.attention(self.attention_norm(x), kv, batch, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class LlamaForCausalLM(Decoder):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        heads = fields.heads()
        has_bias = fields.flag("attention_bias")
        return ModelConfig(
            model_type=fields.text("model_type"),
            **heads,
            num_layers=fields.size("num_hidden_layers"),
            intermediate_size=fields.size("intermediate_size"),
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("rms_norm_eps", 1e-6),
            activation=fields.activation("hidden_act", "silu", ("silu",)),
            rotary=fields.rotary(heads["head_size"]),
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            has_mlp_bias=fields.flag("mlp_bias"),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            **fields.special_tokens(),
        )

    def load_block(self, loader: Loader, layer: int) -> LlamaBlock:
        return LlamaBlock(loader, self.config, layer, self.rotary)
