"""GPT-2 (Radford et al. 2019) and GPT-3 (Brown et al. 2020).

Two fields of ours say what GPT-3's description adds: `attention_pattern` with `attention_window`, for layers that
alternate between dense and locally banded attention, and `head_dim`, for heads that do not add up to the width.
"""

from __future__ import annotations

import dataclasses

import torch

from models.batch import Batch
from models.config import ModelConfig, ModelError
from models.decoder import Decoder
from models.fields import Fields, shown
from models.layers.attention import Attention
from models.layers.linear import stacked_qkv
from models.layers.loader import Loader
from models.layers.mlp import MLP
from models.layers.norm import LayerNorm
from models.layers.positions import LearnedPositions
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    is_scaled_by_layer: bool  # scores of layer i are divided by i + 1


class GPT2Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, loader: Loader, config: GPT2Config, layer: int, rotary: RotaryTables) -> None:
        if config.is_scaled_by_layer:
            config = dataclasses.replace(config, attention_scale=config.scale / (layer + 1))
        self.attention_norm = LayerNorm(loader, "ln_1", config.hidden_size, config.norm_eps)
        self.attention = Attention(
            loader.at("attn"),
            config,
            layer,
            rotary,
            qkv=stacked_qkv(loader.group, config, "c_attn", is_transposed=True),
            output="c_proj",
            is_transposed=True,
        )
        self.mlp_norm = LayerNorm(loader, "ln_2", config.hidden_size, config.norm_eps)
        self.mlp = MLP(loader.at("mlp"), config, "c_fc", "c_proj", is_transposed=True)
        self.num_bytes = sum(part.num_bytes for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp))

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        x = self.attention(self.attention_norm(x), kv, batch, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)


class GPT2LMHeadModel(Decoder):
    ROOTS = ("transformer.", "")
    EMBEDDING = "wte"
    LAYERS = "h"
    NORM = "ln_f"
    FIRST_STAGE = ("wpe",)
    BUFFERS = ("attn.bias", "attn.masked_bias")

    config: GPT2Config
    positions: LearnedPositions | None = None

    @staticmethod
    def parse(fields: Fields) -> GPT2Config:
        heads = fields.heads("n_embd", "n_head")
        fields.one_of("num_key_value_heads", (heads["num_heads"],), heads["num_heads"])
        fields.one_of("add_cross_attention", (False,), False)
        num_layers = fields.num_layers("n_layer")
        return GPT2Config(
            model_type=fields.text("model_type"),
            **heads,
            num_layers=num_layers,
            intermediate_size=fields.size("n_inner", 4 * heads["hidden_size"]),
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("layer_norm_epsilon", 1e-5),
            activation=fields.activation("activation_function", "gelu_new"),
            windows=_windows(fields, num_layers),
            attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
            is_scaled_by_layer=fields.flag("scale_attn_by_inverse_layer_idx"),
            has_qkv_bias=True,
            has_output_bias=True,
            has_mlp_bias=True,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            max_position_embeddings=fields.size("n_positions", 1024),
            **fields.special_tokens(bos_token_id=50256, eos_token_id=50256),
        )

    def load_first(self, loader: Loader) -> None:
        config = self.config
        self.positions = LearnedPositions(
            loader, "wpe", config.max_position_embeddings, config.hidden_size, self.max_model_len
        )

    def embed(self, batch: Batch) -> torch.Tensor:
        assert self.positions is not None
        return self.positions(super().embed(batch), batch.positions)

    def load_block(self, loader: Loader, layer: int) -> GPT2Block:
        return GPT2Block(loader, self.config, layer, self.rotary)

    def load_norm(self, loader: Loader) -> LayerNorm:
        return LayerNorm(loader, self.NORM, self.config.hidden_size, self.config.norm_eps)


def _windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """`attention_pattern` holds "dense" or "banded" for each of the first layers and repeats."""
    if not fields.has("attention_pattern"):
        return ()
    pattern = fields.values["attention_pattern"]
    is_known = isinstance(pattern, list) and all(item in ("dense", "banded") for item in pattern)
    if not is_known or not 1 <= len(pattern) <= num_layers:
        raise ModelError(
            f"{fields.where}attention_pattern must hold 1 to {num_layers} times dense or banded; got {shown(pattern)}"
        )
    if "banded" not in pattern:
        return ()
    window = fields.size("attention_window")
    return tuple(window if pattern[i % len(pattern)] == "banded" else 0 for i in range(num_layers))
