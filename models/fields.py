"""`config.json` as Hugging Face writes it: typed access, and the fields that architectures share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from models.config import Experts, LinearScaling, Llama3Scaling, ModelError, Rotary, YarnScaling

MAX_CONFIG_BYTES = 1 << 20
_MAX_SIZE = 1 << 24  # no dimension of a real model comes near; beyond it a config is broken or hostile
_MAX_NUMBER = 1e38  # of constants: they become fp32
_MAX_LAYERS = 1 << 12  # likewise; every stage counts through all layers, which must not take minutes
_MAX_EXPERTS = 1 << 14  # likewise, in every layer

_LOCAL = "sliding_attention"
_GLOBAL = "full_attention"

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""By Hugging Face's names."""


class Heads(TypedDict):
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int


class Special(TypedDict):
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


class Fields:
    """Typed access to one JSON object; null counts as absent, as transformers writes it.

    Every method raises ModelError naming the field, what is allowed and what is there.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str = "config.json: ",
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """generation: `generation_config.json`, which wins for the special tokens as in transformers."""
        self.values = values
        self.where = where
        self._generation = generation or {}

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where}{name} is missing")
        return value

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def with_defaults(self, **defaults: Any) -> Fields:
        """The same with `defaults` where a field is absent or null."""
        present = {name: value for name, value in self.values.items() if value is not None}
        return Fields({**self.values, **defaults, **present}, self.where, self._generation)

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = _MAX_SIZE) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise ModelError(f"{self.where}{name} must be an integer from {least} to {most}; got {shown(value)}")
        return value

    def num_layers(self, name: str = "num_hidden_layers") -> int:
        return self.size(name, most=_MAX_LAYERS)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not value > 0:  # which NaN is not either
            raise ModelError(f"{self.where}{name} must be a positive number; got {shown(value)}")
        if value > _MAX_NUMBER:
            raise ModelError(f"{self.where}{name} must be at most {_MAX_NUMBER:g}; got {shown(value)}")
        return float(value)

    def cap(self, name: str) -> float:
        """A soft cap; 0 = none."""
        return self.positive(name) if self.has(name) else 0.0

    def layers(self, name: str, num_layers: int) -> frozenset[int]:
        """A list of layers' indices, none if absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or any(type(i) is not int or not 0 <= i < num_layers for i in value):
            raise ModelError(f"{self.where}{name} must hold layers from 0 to {num_layers - 1}; got {shown(value)}")
        return frozenset(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise ModelError(f"{self.where}{name} must be true or false; got {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            raise ModelError(f"{self.where}{name} must be a string; got {shown(value)}")
        return value

    def one_of(self, name: str, allowed: tuple[object, ...], default: object = None) -> Any:
        """For settings whose other values we do not compute."""
        value = self._get(name, default)
        if not any(value is item or value == item for item in allowed):
            names = ", ".join(str(item) for item in allowed)
            raise ModelError(f"{self.where}{name} must be one of {names}; got {shown(value)}")
        return value

    def activation(self, name: str, default: str, allowed: tuple[str, ...] = tuple(_ACTIVATIONS)) -> str:
        """The activation under our kernels' name; `allowed` in Hugging Face's names."""
        return _ACTIVATIONS[self.one_of(name, allowed, default)]

    # --- what architectures share ---------------------------------------------------------------

    def heads(
        self,
        hidden_size: str = "hidden_size",
        num_heads: str = "num_attention_heads",
        num_kv_heads: str = "num_key_value_heads",
        head_size: str = "head_dim",
    ) -> Heads:
        """Width and heads; KV heads are as many as heads and the head size is width / heads unless said."""
        width, heads = self.size(hidden_size), self.size(num_heads)
        if not self.has(head_size) and width % heads:
            raise ModelError(
                f"{self.where}{hidden_size} must be a multiple of {num_heads} when {head_size} is absent; "
                f"got {width} and {heads}"
            )
        kv_heads = self.size(num_kv_heads, heads)
        if heads % kv_heads:
            raise ModelError(
                f"{self.where}{num_heads} must be a multiple of {num_kv_heads}; got {heads} and {kv_heads}"
            )
        size = self.size(head_size, width // heads)
        return {"hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads, "head_size": size}

    def special_tokens(self, *, bos_token_id: int | None = None, eos_token_id: int | None = None) -> Special:
        """The arguments are transformers' defaults of the architecture for absent fields; null says that there is none.

        A vocabulary too small for them has none either.
        """
        vocab_size = self.size("vocab_size")
        defaults = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        special = {name: value for name, value in defaults.items() if value is not None and value < vocab_size}
        special |= {**self.values, **{k: v for k, v in self._generation.items() if v is not None}}
        bos = _token_ids(special, "bos_token_id", vocab_size)
        return {
            "eos_token_ids": _token_ids(special, "eos_token_id", vocab_size),
            "bos_token_id": bos[0] if bos else None,
        }

    def experts(
        self,
        num_experts: str,
        default_experts: int,
        default_per_token: int,
        intermediate_size: int,
        is_normalised: bool,
        dense_layers: tuple[int, ...] = (),
    ) -> Experts:
        """num_experts: name of that field; intermediate_size: of one expert."""
        experts = self.size(num_experts, default_experts, most=_MAX_EXPERTS)
        chosen = self.size("num_experts_per_tok", default_per_token)
        if chosen > experts:
            raise ModelError(f"{self.where}num_experts_per_tok must be at most {num_experts} {experts}; got {chosen}")
        return Experts(
            num_experts=experts,
            num_experts_per_token=chosen,
            intermediate_size=intermediate_size,
            is_normalised=is_normalised,
            dense_layers=dense_layers,
        )

    def rotary(
        self,
        head_size: int,
        default_theta: float = 10000.0,
        layer_type: str = "",
        is_partial: bool = False,
        default_part: float = 1.0,
    ) -> Rotary:
        """RoPE settings under one roof. is_partial: whether the architecture may rotate a part of each head.

        transformers 5 writes `rope_parameters` (by layer type where those differ: name one then), older
        versions `rope_theta` beside an optional `rope_scaling`, whose kind was once called `type`.
        """
        name = "rope_parameters" if self.has("rope_parameters") else "rope_scaling"
        nested = self.values.get(name)
        if isinstance(nested, Mapping) and any(isinstance(value, Mapping) for value in nested.values()):
            if not layer_type:
                raise ModelError(f"{self.where}{name} must be the same for all layers; got {', '.join(nested)}")
            nested, name = nested.get(layer_type), f"{name}: {layer_type}"
        if nested is None:
            nested = {}
        if not isinstance(nested, Mapping):
            raise ModelError(f"{self.where}{name} must be an object; got {shown(nested)}")
        settings = {"rope_theta": self.values.get("rope_theta"), **nested}
        settings["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
        if settings.get("partial_rotary_factor") is None:
            settings["partial_rotary_factor"] = self.values.get("partial_rotary_factor")
        rope = Fields(settings, f"{self.where}{name}: " if nested else self.where)
        part = rope.positive("partial_rotary_factor", default_part)
        if part > 1 or (part != 1 and not is_partial):
            limit = "at most 1" if is_partial else "1"
            raise ModelError(f"{rope.where}partial_rotary_factor must be {limit}; got {part:g}")
        size = int(head_size * part)
        if not size or size % 2:
            raise ModelError(f"{rope.where}head_dim must be even for rotary embeddings; got {part:g} of {head_size}")
        return Rotary(theta=rope.positive("rope_theta", default_theta), size=size, scaling=self._scaling(rope))

    def _scaling(self, rope: Fields) -> Llama3Scaling | LinearScaling | YarnScaling | None:
        kind = rope.one_of("rope_type", ("default", "linear", "llama3", "yarn"))
        if kind == "default":
            return None
        factor = rope.positive("factor")
        if kind == "linear":
            return LinearScaling(factor=factor)
        positions = self.size("max_position_embeddings", 2048)
        if self.has("original_max_position_embeddings"):  # beside the scaling, where it wins in transformers
            positions = self.size("original_max_position_embeddings")
        else:
            positions = rope.size("original_max_position_embeddings", positions)
        if kind == "yarn":
            return _yarn(rope, factor, positions)
        scaling = Llama3Scaling(
            factor=factor,
            low_freq_factor=rope.positive("low_freq_factor"),
            high_freq_factor=rope.positive("high_freq_factor"),
            original_max_position_embeddings=positions,
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ModelError(
                f"{rope.where}high_freq_factor must be above low_freq_factor; "
                f"got {scaling.high_freq_factor} and {scaling.low_freq_factor}"
            )
        return scaling

    def max_positions(self, rotary: Rotary, default: int) -> int:
        """`max_position_embeddings`, or as far as YaRN stretches the context if that is further.

        Qwen's model cards ask for the scaling to be added to a config that keeps the old number.
        """
        positions = self.size("max_position_embeddings", default)
        if isinstance(rotary.scaling, YarnScaling):
            stretched = int(rotary.scaling.original_max_position_embeddings * rotary.scaling.factor)
            return max(positions, min(stretched, _MAX_SIZE))
        return positions

    def window(self, name: str = "sliding_window", default: int = 0) -> int:
        """Tokens of a sliding window; 0 = none, as null says. Absent and null may mean different things."""
        return self.size(name, default) if self.has(name) or (name not in self.values and default) else 0

    def windows(self, num_layers: int, window: int, has_window: Callable[[int], bool]) -> tuple[int, ...]:
        """`window` or 0 for every layer: by `layer_types`, or by `has_window` of its index where that is absent.

        () where no layer has one.
        """
        kinds = self.values.get("layer_types")
        if kinds is None:
            kinds = [_LOCAL if has_window(layer) else _GLOBAL for layer in range(num_layers)]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelError(f"{self.where}layer_types must be a list of {num_layers}; got {shown(kinds)}")
        for kind in kinds:
            if kind not in (_LOCAL, _GLOBAL):
                raise ModelError(f"{self.where}layer_types must hold {_GLOBAL} or {_LOCAL}; got {shown(kind)}")
        if _LOCAL not in kinds:
            return ()
        if not window:
            raise ModelError(f"{self.where}layer_types has {_LOCAL} layers, but sliding_window is not set or not used")
        return tuple(window if kind == _LOCAL else 0 for kind in kinds)


def _yarn(rope: Fields, factor: float, positions: int) -> YarnScaling:
    """positions: of the context before it was stretched."""

    def temperature(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    if factor < 1:
        raise ModelError(f"{rope.where}factor must be at least 1 for yarn; got {factor:g}")
    if rope.has("rope_theta") and rope.positive("rope_theta") <= 1:
        raise ModelError(f"{rope.where}rope_theta must be above 1 for yarn; got {rope.positive('rope_theta'):g}")
    if rope.has("mscale") and rope.has("mscale_all_dim"):  # DeepSeek's
        attention_factor = temperature(rope.positive("mscale")) / temperature(rope.positive("mscale_all_dim"))
    else:
        attention_factor = temperature()
    scaling = YarnScaling(
        factor=factor,
        attention_factor=rope.positive("attention_factor", attention_factor),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        original_max_position_embeddings=positions,
        is_truncated=rope.flag("truncate", True),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise ModelError(
            f"{rope.where}beta_fast must not be below beta_slow; got {scaling.beta_fast:g} and {scaling.beta_slow:g}"
        )
    return scaling


def read_fields(folder: Path) -> Fields:
    """`config.json` and, where present, `generation_config.json`. Raises ModelError."""
    generation = folder / "generation_config.json"
    return Fields(
        _load_object(folder / "config.json"), generation=_load_object(generation) if generation.exists() else None
    )


def _token_ids(special: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    value = special.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ModelError(f"{name} must hold token ids from 0 to {vocab_size - 1}; got {shown(token_id)}")
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
        raise ModelError(f"{path.name} must hold a JSON object; got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
