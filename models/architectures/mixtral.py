"""Mixtral: Mistral with a mixture of experts in every layer (Jiang et al. 2024)."""

from __future__ import annotations

import dataclasses

from models.architectures.llama import LlamaBlock, LlamaForCausalLM
from models.config import ModelConfig
from models.fields import Fields
from models.layers.experts import ExpertNames, MixtureOfExperts
from models.layers.loader import Loader
from models.layers.mlp import FeedForward

_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_THETA = 1e6
_NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")


class MixtralBlock(LlamaBlock):
    def load_mlp(self, loader: Loader, config: ModelConfig, layer: int) -> FeedForward:
        return MixtureOfExperts(loader, config, _NAMES)


class MixtralForCausalLM(LlamaForCausalLM):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        config = LlamaForCausalLM.parse(fields.with_defaults(**_DEFAULTS))
        window = fields.window()
        return dataclasses.replace(
            config,
            rotary=fields.rotary(config.head_size, _THETA),
            windows=(window,) * config.num_layers if window else (),
            experts=fields.experts("num_local_experts", 8, 2, config.intermediate_size, is_normalised=True),
            has_qkv_bias=False,
            has_output_bias=False,
            has_mlp_bias=False,
        )

    def load_block(self, loader: Loader, layer: int) -> MixtralBlock:
        return MixtralBlock(loader, self.config, layer, self.rotary)
