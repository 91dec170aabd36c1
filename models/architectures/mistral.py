"""Mistral: Llama's block with a sliding window over all layers, or none since v0.2 (Jiang et al. 2023)."""

from __future__ import annotations

import dataclasses

from models.architectures.llama import LlamaForCausalLM
from models.config import ModelConfig
from models.fields import Fields

_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}


class MistralForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        config = LlamaForCausalLM.parse(fields.with_defaults(**_DEFAULTS))
        window = fields.window(default=4096)
        return dataclasses.replace(
            config,
            windows=(window,) * config.num_layers if window else (),
            has_qkv_bias=False,
            has_output_bias=False,
            has_mlp_bias=False,
        )
