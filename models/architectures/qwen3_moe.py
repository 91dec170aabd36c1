"""Qwen3's mixtures of experts: Qwen3 with many small experts in most layers (Yang et al. 2025)."""

from __future__ import annotations

import dataclasses

from models.architectures.llama import LlamaBlock, LlamaForCausalLM
from models.config import ModelConfig
from models.fields import Fields
from models.layers.experts import ExpertNames, MixtureOfExperts
from models.layers.loader import Loader
from models.layers.mlp import FeedForward

_DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768}
_NAMES = ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj")


class Qwen3MoeBlock(LlamaBlock):
    def load_mlp(self, loader: Loader, config: ModelConfig, layer: int) -> FeedForward:
        assert config.experts is not None
        if layer in config.experts.dense_layers:
            return super().load_mlp(loader, config, layer)
        return MixtureOfExperts(loader, config, _NAMES)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        config = LlamaForCausalLM.parse(fields.with_defaults(**_DEFAULTS))
        # transformers 5 renamed the number of experts; checkpoints on the hub have the old name.
        num_experts = "num_experts" if fields.has("num_experts") else "num_local_experts"
        step = fields.size("decoder_sparse_step", 1)
        dense = fields.layers("mlp_only_layers", config.num_layers)
        window = fields.window(default=4096) if fields.flag("use_sliding_window") else 0
        return dataclasses.replace(
            config,
            windows=(window,) * config.num_layers if window else (),
            has_head_norm=True,
            has_mlp_bias=False,
            **fields.special_tokens(),  # without Llama's defaults
            experts=fields.experts(
                num_experts,
                128,
                8,
                fields.size("moe_intermediate_size", 768),
                is_normalised=fields.flag("norm_topk_prob"),
                dense_layers=tuple(i for i in range(config.num_layers) if i in dense or (i + 1) % step),
            ),
        )

    def load_block(self, loader: Loader, layer: int) -> Qwen3MoeBlock:
        return Qwen3MoeBlock(loader, self.config, layer, self.rotary)
