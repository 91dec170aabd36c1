"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v; later layers may have a window (Yang et al. 2024)."""

from __future__ import annotations

import dataclasses

from models.architectures.llama import LlamaForCausalLM
from models.config import ModelConfig
from models.fields import Fields

_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}


class Qwen2ForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        config = LlamaForCausalLM.parse(fields.with_defaults(**_DEFAULTS))
        return dataclasses.replace(
            config,
            windows=windows(fields, config.num_layers),
            has_qkv_bias=True,
            has_output_bias=False,
            has_mlp_bias=False,
            **fields.special_tokens(),  # without Llama's defaults
        )


def windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Of Qwen2's and Qwen3's layers: none below `max_window_layers`, and none at all unless it is switched on."""
    window = fields.window(default=4096) if fields.flag("use_sliding_window") else 0
    first = fields.size("max_window_layers", 28, least=0)
    return fields.windows(num_layers, window, lambda layer: window > 0 and layer >= first)
