"""GPT-NeoX-20B, Pythia (Black et al. 2022; Biderman et al. 2023)."""

from __future__ import annotations

import dataclasses

import torch

from models.batch import Batch
from models.config import ModelConfig
from models.decoder import Decoder
from models.fields import Fields
from models.layers.attention import Attention
from models.layers.linear import interleaved_qkv
from models.layers.loader import Loader
from models.layers.mlp import MLP
from models.layers.norm import LayerNorm
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    has_parallel_residual: bool


class GPTNeoXBlock:
    """x + attention(norm(x)) + mlp(norm'(x)), or, without the parallel residual, one after the other."""

    def __init__(self, loader: Loader, config: GPTNeoXConfig, layer: int, rotary: RotaryTables) -> None:
        self.attention_norm = LayerNorm(loader, "input_layernorm", config.hidden_size, config.norm_eps)
        attention = loader.at("attention")
        qkv = interleaved_qkv(loader.group, config, "query_key_value")
        self.attention = Attention(attention, config, layer, rotary, qkv=qkv, output="dense")
        self.mlp_norm = LayerNorm(loader, "post_attention_layernorm", config.hidden_size, config.norm_eps)
        self.mlp = MLP(loader.at("mlp"), config, "dense_h_to_4h", "dense_4h_to_h")
        self.num_bytes = sum(part.num_bytes for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp))
        self._is_parallel = config.has_parallel_residual

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        before = self.mlp_norm(x) if self._is_parallel else None  # attention changes x in place
        x = self.attention(self.attention_norm(x), kv, batch, residual=x)
        return self.mlp(self.mlp_norm(x) if before is None else before, residual=x)


class GPTNeoXForCausalLM(Decoder):
    ROOTS = ("gpt_neox.", "")
    EMBEDDING = "embed_in"
    NORM = "final_layer_norm"
    HEAD = "embed_out"
    BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.")

    config: GPTNeoXConfig

    @staticmethod
    def parse(fields: Fields) -> GPTNeoXConfig:
        heads = fields.heads(head_size="")
        fields.one_of("num_key_value_heads", (heads["num_heads"],), heads["num_heads"])
        fields.one_of("head_dim", (heads["head_size"],), heads["head_size"])
        has_bias = fields.flag("attention_bias", True)
        return GPTNeoXConfig(
            model_type=fields.text("model_type"),
            **heads,
            num_layers=fields.num_layers(),
            intermediate_size=fields.size("intermediate_size"),
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("layer_norm_eps", 1e-5),
            activation=fields.activation("hidden_act", "gelu"),
            rotary=fields.rotary(
                heads["head_size"],
                fields.positive("rotary_emb_base", 10000.0),
                is_partial=True,
                default_part=fields.positive("rotary_pct", 0.25),
            ),
            has_parallel_residual=fields.flag("use_parallel_residual", True),
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            has_mlp_bias=True,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            **fields.special_tokens(bos_token_id=0, eos_token_id=2),
        )

    def load_block(self, loader: Loader, layer: int) -> GPTNeoXBlock:
        return GPTNeoXBlock(loader, self.config, layer, self.rotary)

    def load_norm(self, loader: Loader) -> LayerNorm:
        return LayerNorm(loader, self.NORM, self.config.hidden_size, self.config.norm_eps)
