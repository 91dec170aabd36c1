"""Qwen3: Llama's block with every head of q and k normalised (Yang et al. 2025)."""

from __future__ import annotations

import dataclasses

from models.architectures.llama import LlamaForCausalLM
from models.architectures.qwen2 import windows
from models.config import ModelConfig
from models.fields import Fields

_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}


class Qwen3ForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        config = LlamaForCausalLM.parse(fields.with_defaults(**_DEFAULTS))
        return dataclasses.replace(
            config,
            windows=windows(fields, config.num_layers),
            has_head_norm=True,
            has_mlp_bias=False,
            **fields.special_tokens(),  # without Llama's defaults
        )
