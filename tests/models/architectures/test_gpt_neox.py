"""GPT-NeoX against transformers: partial rotation, both residuals, q, k and v interleaved by head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

from models.config import ModelError, Rotary
from models.fields import Fields
from models.ops.kernels import Kernels
from models.registry import load_config, parse_config
from tests.models.architectures.parity import Case
from tests.models.architectures.shares import assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

FIELDS: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,  # of 24 elements, 6 of which rotate
    "intermediate_size": 97,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rotary_pct": 0.25,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "rotates_all": {"rotary_pct": 1.0, "rotary_emb_base": 777},
    "no_attention_bias": {"attention_bias": False, "hidden_act": "relu", "num_attention_heads": 6},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu_new", "layer_norm_eps": 0.1},
    "three_heads": {"hidden_size": 66, "num_attention_heads": 3, "rotary_pct": 0.3, "num_hidden_layers": 1},
}


def write(folder: Path, **overrides: Any) -> Path:
    return tiny_checkpoint(folder, GPTNeoXConfig, {**FIELDS, **overrides})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(write(tmp_path, **VARIANTS[variant])).assert_parity(kernels, num_shuffles=1)


@pytest.mark.parametrize("is_parallel", [True, False])
def test_ranks_and_stages(is_parallel: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, use_parallel_residual=is_parallel)
    assert_ranks_agree(folder)
    assert_stages_agree(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(write(tmp_path), dtype)


def test_an_old_export(kernels: Kernels, tmp_path: Path) -> None:
    """The rotary settings by their own names, and buffers among the weights, as GPT-NeoX-20B was published."""
    case = Case(write(tmp_path, rotary_pct=0.5, rotary_emb_base=500))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, "rotary_pct": 0.5, "rotary_emb_base": 500}))
    assert load_config(tmp_path).rotary == Rotary(theta=500.0, size=12)
    weights = load_file(tmp_path / "model.safetensors")
    for i in range(3):
        weights[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool)
        weights[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        weights[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, tmp_path / "model.safetensors")
    case.assert_parity(kernels, num_shuffles=0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be one of 4; got 2"),
        ({"head_dim": 32}, "head_dim must be one of 24; got 32"),
        ({"rotary_pct": 0.3, "hidden_size": 120}, "head_dim must be even for rotary embeddings; got 0.3 of 30"),
        ({"rotary_pct": 1.5}, "partial_rotary_factor must be at most 1; got 1.5"),
        ({"rotary_emb_base": -1}, "rotary_emb_base must be a positive number; got -1"),
        ({"hidden_act": "mish"}, "hidden_act must be one of .*; got 'mish'"),
        ({"use_parallel_residual": 1}, "use_parallel_residual must be true or false; got 1"),
    ],
)
def test_what_is_refused(overrides: dict[str, Any], words: str) -> None:
    fields = {"model_type": "gpt_neox", **FIELDS, **overrides}
    with pytest.raises(ModelError, match=words):
        parse_config(Fields(fields))
