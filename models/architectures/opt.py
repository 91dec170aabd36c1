"""OPT and what shares its block: Galactica (Zhang et al. 2022; Taylor et al. 2022)."""

from __future__ import annotations

import dataclasses

import torch

from models.batch import Batch
from models.config import ModelConfig
from models.decoder import Decoder, Norm
from models.fields import Fields
from models.layers.attention import Attention
from models.layers.loader import Loader
from models.layers.mlp import MLP
from models.layers.norm import LayerNorm
from models.layers.positions import LearnedPositions
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV
from models.parallel import Stages
from models.quant.method import PackedWeight, WeightPart

_NORM_EPS = 1e-5
_POSITION_OFFSET = 2  # rows of the table that training reserved for padding


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OPTConfig(ModelConfig):
    embedding_size: int  # of token vectors; projected where it is not the hidden size
    is_norm_first: bool  # norms before attention and feed-forward network, as all but opt-350m have them
    has_final_norm: bool
    has_norm_weights: bool

    @property
    def has_projections(self) -> bool:
        return self.embedding_size != self.hidden_size


class OPTBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)); with norms last, norm(x + attention(x)) and norm(x + mlp(x))."""

    def __init__(self, loader: Loader, config: OPTConfig, layer: int, rotary: RotaryTables) -> None:
        self.attention_norm = _norm(loader, "self_attn_layer_norm", config)
        self.attention = Attention(loader.at("self_attn"), config, layer, rotary, output="out_proj")
        self.mlp_norm = _norm(loader, "final_layer_norm", config)
        self.mlp = MLP(loader, config, "fc1", "fc2")
        self.num_bytes = sum(part.num_bytes for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp))
        self._is_norm_first = config.is_norm_first

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        if self._is_norm_first:
            x = self.attention(self.attention_norm(x), kv, batch, residual=x)
            return self.mlp(self.mlp_norm(x), residual=x)
        x = self.attention_norm(self.attention(x, kv, batch, residual=x))
        return self.mlp_norm(self.mlp(x, residual=x))


class OPTEnd:
    """What stands between the last block and the head: a norm, a projection to the embedding's width, or neither."""

    def __init__(self, loader: Loader, config: OPTConfig) -> None:
        self._norm = _norm(loader, OPTForCausalLM.NORM, config) if config.has_final_norm else None
        shape = (config.embedding_size, config.hidden_size)
        self._projection = loader.linear([WeightPart("project_out", shape)]) if config.has_projections else None
        self.num_bytes = sum(part.num_bytes for part in (self._norm, self._projection) if part is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[S, hidden] -> [S, embedding_size]."""
        if self._norm is not None:
            x = self._norm(x)
        return x if self._projection is None else self._projection.apply(x)


class OPTForCausalLM(Decoder):
    ROOTS = ("model.decoder.", "decoder.")
    NORM = "final_layer_norm"
    FIRST_STAGE = ("embed_positions", "project_in")
    LAST_STAGE = ("project_out",)
    BUFFERS = ()

    config: OPTConfig
    positions: LearnedPositions | None = None
    project_in: PackedWeight | None = None

    @staticmethod
    def parse(fields: Fields) -> OPTConfig:
        heads = fields.heads(head_size="")
        fields.one_of("num_key_value_heads", (heads["num_heads"],), heads["num_heads"])
        fields.one_of("head_dim", (heads["head_size"],), heads["head_size"])
        has_bias = fields.flag("enable_bias", True)
        is_norm_first = fields.flag("do_layer_norm_before", True)
        return OPTConfig(
            model_type=fields.text("model_type"),
            **heads,
            num_layers=fields.num_layers(),
            intermediate_size=fields.size("ffn_dim"),
            vocab_size=fields.size("vocab_size"),
            norm_eps=_NORM_EPS,
            activation=fields.activation("activation_function", "relu"),
            embedding_size=fields.size("word_embed_proj_dim", heads["hidden_size"]),
            is_norm_first=is_norm_first,
            has_final_norm=is_norm_first and not fields.flag("_remove_final_layer_norm"),
            has_norm_weights=fields.flag("layer_norm_elementwise_affine", True),
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            has_mlp_bias=has_bias,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            **fields.special_tokens(bos_token_id=2, eos_token_id=2),
        )

    def __init__(self, loader: Loader, config: OPTConfig, stages: Stages, max_model_len: int) -> None:
        super().__init__(loader, config, stages, max_model_len)
        if self.project_in is not None:
            self.weight_bytes += self.project_in.num_bytes

    @property
    def embedding_size(self) -> int:
        return self.config.embedding_size

    def load_first(self, loader: Loader) -> None:
        config = self.config
        self.positions = LearnedPositions(
            loader,
            "embed_positions",
            config.max_position_embeddings,
            config.hidden_size,
            self.max_model_len,
            _POSITION_OFFSET,
        )
        if config.has_projections:
            shape = (config.hidden_size, config.embedding_size)
            self.project_in = loader.linear([WeightPart("project_in", shape)])

    def embed(self, batch: Batch) -> torch.Tensor:
        assert self.positions is not None
        x = super().embed(batch)
        if self.project_in is not None:
            x = self.project_in.apply(x)
        return self.positions(x, batch.positions)

    def load_block(self, loader: Loader, layer: int) -> OPTBlock:
        return OPTBlock(loader, self.config, layer, self.rotary)

    def load_norm(self, loader: Loader) -> Norm:
        return OPTEnd(loader, self.config)


def _norm(loader: Loader, name: str, config: OPTConfig) -> LayerNorm:
    return LayerNorm(loader, name, config.hidden_size, config.norm_eps, config.has_norm_weights)
