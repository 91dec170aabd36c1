"""What a model is: the sizes and constants that the maths needs, whatever the architecture calls them.

An architecture reads them out of its `config.json` (models/fields.py checks every field).
"""

from __future__ import annotations

import dataclasses


class ModelError(Exception):
    """A model that cannot be loaded; the text names the field, tensor or file, the limit and the value."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low RoPE frequencies (Grattafiori et al. 2024, section 3.4.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN: long waves stretched by `factor`, short ones kept, a ramp between (Peng et al. 2023)."""

    factor: float
    attention_factor: float  # of cosines and sines: the temperature of the attention, once for q and once for k
    beta_fast: float  # turns within the old context: above it a wave is short
    beta_slow: float  # likewise: below it a wave is long
    original_max_position_embeddings: int
    is_truncated: bool = True  # whether the ramp begins and ends at whole frequencies


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary position embeddings (RoFormer, Su et al. 2021) of the first `size` elements of every head."""

    theta: float
    size: int
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the feed-forward network (Shazeer et al. 2017)."""

    num_experts: int
    num_experts_per_token: int  # at most num_experts
    intermediate_size: int  # of one expert
    is_normalised: bool  # weights of the chosen experts add up to 1
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary feed-forward network


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder. Sizes count the whole model, not one rank's share.

    An architecture that needs more than this derives from it in its own file.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    activation: str = "silu"  # one of models.ops.kernels.ACTIVATIONS
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None  # of layers with a window; None = as the others
    windows: tuple[int, ...] = ()  # per layer: 0 = all of the context; () = all layers 0
    attention_scale: float | None = None  # of scores; None = head_size ** -0.5
    attention_softcap: float = 0.0  # 0 = none
    logits_softcap: float = 0.0
    has_head_norm: bool = False  # every head of q and k is RMS-normalised
    has_qkv_bias: bool = False
    has_output_bias: bool = False  # of the attention's output projection
    has_mlp_bias: bool = False
    experts: Experts | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def window(self, layer: int) -> int:
        """Tokens that a token of this layer sees, itself included; 0 = all."""
        return self.windows[layer] if self.windows else 0

    @property
    def scale(self) -> float:
        """Of attention scores."""
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale
