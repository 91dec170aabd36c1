"""What a model is: the fields of a Hugging Face `config.json` that the maths needs, checked once."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 1 << 20
_MAX_SIZE = 1 << 24  # no dimension of a real model comes near; beyond it a config is broken or hostile


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
class ModelConfig:
    """Sizes and constants of a decoder. Sizes count the whole model, not one rank's share."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Parse `config.json` and, where present, `generation_config.json`. Raises ModelError."""
        path = folder / "generation_config.json"
        return cls.from_dict(_load_object(folder / "config.json"), _load_object(path) if path.exists() else {})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Parse the two documents; `generation` wins for the special tokens, as in transformers.

        Raises ModelError naming the first field that is missing, wrong or not supported.
        """
        fields = _Fields(config)
        if config.get("quantization_config"):
            raise ModelError("config.json: quantization_config is not supported; convert the model with `argosy pull`")
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ModelError(f"config.json: hidden_act must be 'silu'; got {activation!r}")
        hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise ModelError(
                "config.json: hidden_size must be a multiple of num_attention_heads when head_dim is absent; "
                f"got {hidden_size} and {num_heads}"
            )
        num_kv_heads = fields.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads must be a multiple of num_key_value_heads; "
                f"got {num_heads} and {num_kv_heads}"
            )
        head_size = fields.size("head_dim", hidden_size // num_heads)
        if head_size % 2:
            raise ModelError(f"config.json: head_dim must be even for rotary embeddings; got {head_size}")
        vocab_size = fields.size("vocab_size")
        max_positions = fields.size("max_position_embeddings", 2048)
        rope = _rope_settings(config)
        special = {**config, **{k: v for k, v in (generation or {}).items() if v is not None}}
        bos = _token_ids(special, "bos_token_id", vocab_size)
        return cls(
            model_type=fields.text("model_type"),
            hidden_size=hidden_size,
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            intermediate_size=fields.size("intermediate_size"),
            vocab_size=vocab_size,
            rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
            rope_theta=rope.positive("rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope, max_positions),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            max_position_embeddings=max_positions,
            eos_token_ids=_token_ids(special, "eos_token_id", vocab_size),
            bos_token_id=bos[0] if bos else None,
        )


class _Fields:
    """Typed access to one JSON object; null counts as absent, as transformers writes it."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json: ") -> None:
        self.values = values
        self.where = where

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where}{name} is missing")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise ModelError(f"{self.where}{name} must be an integer from 1 to {_MAX_SIZE}; got {_shown(value)}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"{self.where}{name} must be a positive number; got {_shown(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name, False)
        if type(value) is not bool:
            raise ModelError(f"{self.where}{name} must be true or false; got {_shown(value)}")
        return value

    def text(self, name: str) -> str:
        value = self._get(name, None)
        if type(value) is not str:
            raise ModelError(f"{self.where}{name} must be a string; got {_shown(value)}")
        return value


def _rope_settings(config: Mapping[str, Any]) -> _Fields:
    """RoPE settings under one roof: transformers 5 writes `rope_parameters`, older versions
    `rope_theta` beside an optional `rope_scaling`, whose kind was once called `type`."""
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    nested = config.get(name)
    if nested is None:
        nested = {}
    if not isinstance(nested, Mapping):
        raise ModelError(f"config.json: {name} must be an object; got {_shown(nested)}")
    settings = {"rope_theta": config.get("rope_theta"), **nested}
    settings["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    partial = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor must be 1; got {_shown(partial)}")
    return _Fields(settings, f"config.json: {name}: " if nested else "config.json: ")


def _rope_scaling(rope: _Fields, max_positions: int) -> Llama3Scaling | None:
    kind = rope.values["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"{rope.where}rope_type must be one of default, llama3; got {_shown(kind)}")
    scaling = Llama3Scaling(
        factor=rope.positive("factor"),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings", max_positions),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelError(
            f"{rope.where}high_freq_factor must be above low_freq_factor; "
            f"got {scaling.high_freq_factor} and {scaling.low_freq_factor}"
        )
    return scaling


def _token_ids(special: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    value = special.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ModelError(f"{name} must hold token ids from 0 to {vocab_size - 1}; got {_shown(token_id)}")
    return tuple(dict.fromkeys(ids))


def _load_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path.name}: {path.stat().st_size} bytes; the limit is {MAX_CONFIG_BYTES}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read in {path.parent}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} must hold a JSON object; got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
