"""Gemma 3, the language model: most layers see a window, and norms stand on both sides (Kamath et al. 2025)."""

from __future__ import annotations

import torch

from models.batch import Batch
from models.config import ModelConfig, ModelError, Rotary
from models.decoder import Decoder
from models.fields import Fields
from models.layers.attention import Attention
from models.layers.loader import Loader
from models.layers.mlp import GatedMLP
from models.layers.norm import RMSNorm, head_norms
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV

_GATES = ("gelu_pytorch_tanh", "gelu_new", "gelu", "silu")
_OFFSET = 1.0  # norms store their weights less one


class Gemma3Block:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, loader: Loader, config: ModelConfig, layer: int, rotary: RotaryTables) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(loader, name, config.hidden_size, config.norm_eps, _OFFSET)

        self.attention_norm = norm("input_layernorm")
        attention = loader.at("self_attn")
        norms = head_norms(attention, config.head_size, _OFFSET)
        self.attention = Attention(attention, config, layer, rotary, head_norms=norms)
        self.after_attention_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = GatedMLP(loader.at("mlp"), config)
        self.after_mlp_norm = norm("post_feedforward_layernorm")
        parts = (self.attention_norm, self.after_attention_norm, self.mlp_norm, self.after_mlp_norm)
        self.num_bytes = sum(part.num_bytes for part in (*parts, self.attention, self.mlp))

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        x.add_(self.after_attention_norm(self.attention(self.attention_norm(x), kv, batch)))
        return x.add_(self.after_mlp_norm(self.mlp(self.mlp_norm(x))))


class Gemma3ForCausalLM(Decoder):
    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        fields = fields.with_defaults(num_key_value_heads=4, head_dim=256, max_position_embeddings=131072)
        fields.one_of("use_bidirectional_attention", (False,), False)
        heads = fields.heads()
        num_layers = fields.num_layers()
        pattern = fields.size("sliding_window_pattern", 6)
        rotary, local_rotary = _rotary(fields, heads["head_size"])
        has_bias = fields.flag("attention_bias")
        return ModelConfig(
            model_type=fields.text("model_type"),
            **heads,
            num_layers=num_layers,
            intermediate_size=fields.size("intermediate_size"),
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("rms_norm_eps", 1e-6),
            activation=fields.activation("hidden_activation", "gelu_pytorch_tanh", _GATES),
            rotary=rotary,
            local_rotary=local_rotary,
            windows=fields.windows(num_layers, fields.window(default=4096), lambda layer: (layer + 1) % pattern > 0),
            attention_scale=fields.positive("query_pre_attn_scalar", 256.0) ** -0.5,
            attention_softcap=fields.cap("attn_logit_softcapping"),
            logits_softcap=fields.cap("final_logit_softcapping"),
            has_head_norm=True,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            max_position_embeddings=fields.max_positions(rotary, 131072),
            **fields.special_tokens(bos_token_id=2, eos_token_id=1),
        )

    def load_block(self, loader: Loader, layer: int) -> Gemma3Block:
        return Gemma3Block(loader, self.config, layer, self.rotary)

    def load_norm(self, loader: Loader) -> RMSNorm:
        return RMSNorm(loader, self.NORM, self.config.hidden_size, self.config.norm_eps, _OFFSET)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Scaled by the square root of the width, which is rounded to the weights' type as in training."""
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.weight_dtype).item()
        return super().embed(batch).mul_(scale)


def _rotary(fields: Fields, head_size: int) -> tuple[Rotary, Rotary]:
    """Of the layers that see everything, and of those with a window."""
    nested = fields.values.get("rope_parameters")
    if nested is None:  # before transformers 5; the scaling is that of the global layers alone
        local = Rotary(theta=fields.positive("rope_local_base_freq", 10000.0), size=head_size)
        return fields.rotary(head_size, 1e6), local
    if not isinstance(nested, dict) or not {"full_attention", "sliding_attention"} & nested.keys():
        raise ModelError(f"{fields.where}rope_parameters must hold full_attention and sliding_attention")
    return (
        fields.rotary(head_size, 1e6, layer_type="full_attention"),
        fields.rotary(head_size, 1e4, layer_type="sliding_attention"),
    )
