"""What config.json may say, and how a wrong one is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from models.config import LinearScaling, Llama3Scaling, ModelConfig, ModelError, Rotary
from models.fields import MAX_CONFIG_BYTES, Fields
from models.registry import ARCHITECTURES, load_config, parse_config
from tests.tiny import LLAMA3_ROPE, tiny_llama

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
}

NAMES_OF_SIZES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "ffn_dim", "vocab_size"),
    *("n_embd", "n_layer", "n_head"),
}


def parsed(config: dict[str, Any]) -> ModelConfig:
    return parse_config(Fields(config))


def test_absent_fields_have_transformers_defaults() -> None:
    config = parsed(SIZES)
    assert (config.num_kv_heads, config.head_size) == (4, 16)
    assert (config.rotary, config.norm_eps) == (Rotary(theta=10000.0, size=16), 1e-6)
    assert not (config.tie_word_embeddings or config.has_qkv_bias or config.has_output_bias or config.has_mlp_bias)
    assert (config.max_position_embeddings, config.eos_token_ids, config.bos_token_id) == (2048, (2,), 1)


def test_what_transformers_writes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, rope_parameters=LLAMA3_ROPE, attention_bias=True, eos_token_id=[5, 7])
    config = load_config(folder)
    assert (config.num_heads, config.num_kv_heads, config.head_size, config.hidden_size) == (5, 1, 24, 80)
    assert (config.intermediate_size, config.vocab_size, config.num_layers) == (97, 131, 3)
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    assert config.rotary == Rotary(theta=500000.0, size=24, scaling=scaling)
    assert (config.has_qkv_bias, config.has_output_bias, config.has_mlp_bias) == (True, True, False)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (5, 7))


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_settings_of_older_versions(kind: str) -> None:
    new = parsed({**SIZES, "rope_parameters": LLAMA3_ROPE})
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_type", "rope_theta")}
    old = parsed({**SIZES, "rope_theta": 500000.0, "rope_scaling": {kind: "llama3", **scaling}})
    assert new == old


def test_linear_scaling() -> None:
    config = parsed({**SIZES, "rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rotary == Rotary(theta=10000.0, size=16, scaling=LinearScaling(factor=2.0))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_absent_has_transformers_defaults(model_type: str) -> None:
    """Of every family and every field but the sizes."""
    default = json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    sizes = [name for name in default if name in NAMES_OF_SIZES]
    assert len(sizes) == 5 - (model_type == "gpt2")
    assert parsed({"model_type": model_type, **{name: default[name] for name in sizes}}) == parsed(default)


def test_special_tokens_that_are_not_there() -> None:
    """Null is no default, and neither is an id beyond the vocabulary."""
    config = parsed({**SIZES, "eos_token_id": None, "bos_token_id": None})
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    config = parsed({**SIZES, "vocab_size": 2})
    assert (config.eos_token_ids, config.bos_token_id) == ((), 1)


def test_the_old_context_beside_the_scaling_wins() -> None:
    """As in transformers, whose Phi-3 has it there."""
    config = parsed({**SIZES, "rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 77})
    assert config.rotary is not None
    assert isinstance(config.rotary.scaling, Llama3Scaling)
    assert config.rotary.scaling.original_max_position_embeddings == 77


def test_generation_config_wins_for_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "eos_token_id": 2, "bos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9, 2], "bos_token_id": None}))
    config = load_config(tmp_path)
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 9), 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 7}, "model_type must be a string; got 7"),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1 to .*; got 0"),
        ({"vocab_size": 1 << 40}, f"vocab_size .*; got {1 << 40}"),
        ({"num_hidden_layers": 1 << 24}, f"num_hidden_layers must be an integer from 1 to 4096; got {1 << 24}"),
        (
            {"model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 1 << 24},
            f"num_local_experts must be an integer from 1 to 16384; got {1 << 24}",
        ),
        ({"num_hidden_layers": True}, "num_hidden_layers .*; got True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers .*; got 2.0"),
        ({"hidden_size": 66}, "hidden_size must be a multiple of num_attention_heads .*; got 66 and 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads; got 4 and 3"),
        ({"head_dim": 15}, "head_dim must be even .*; got 1 of 15"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a positive number; got -1e-06"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number; got nan"),
        ({"rms_norm_eps": math.inf}, r"rms_norm_eps must be at most 1e\+38; got inf"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps must be at most 1e\+38; got 1000"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 1e38}}, "must be 1; got 1e"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive number; got '10000'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false; got 'yes'"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu; got 'gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type must be one of default, linear, llama3, yarn; got"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor must be a positive number; got 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters: low_freq_factor is missing"),
        ({"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor must be above"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object; got \[1\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1; got 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ({"eos_token_id": 300}, "eos_token_id must hold token ids from 0 to 299; got 300"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id .*; got '2'"),
        ({"bos_token_id": -1}, "bos_token_id .*; got -1"),
    ],
)
def test_wrong_fields_are_named_with_limit_and_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parsed({**SIZES, **change})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[]", "config.json must hold a JSON object"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"the limit is {MAX_CONFIG_BYTES}"),
        (None, "config.json cannot be read"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        load_config(tmp_path)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ModelError) as caught:
        parsed({**SIZES, "model_type": ["x" * 10_000]})
    assert len(str(caught.value)) < 200
