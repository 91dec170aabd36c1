"""OPT against transformers: shifted learned positions, norms before or after, a narrow embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig

from models.config import ModelError
from models.fields import Fields
from models.ops.kernels import Kernels
from models.parallel import Stages
from models.registry import load_model, parse_config
from tests.models.architectures.parity import Case
from tests.models.architectures.shares import assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

FIELDS: dict[str, Any] = {
    "hidden_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 97,
    "vocab_size": 131,
    "max_position_embeddings": 300,
    "init_std": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT_350M: dict[str, Any] = {"do_layer_norm_before": False, "word_embed_proj_dim": 36}
GALACTICA: dict[str, Any] = {
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "activation_function": "gelu",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "norms_first": {},
    "opt-350m": OPT_350M,
    "galactica": GALACTICA,
    "norms_last": {"do_layer_norm_before": False},
    "narrow_norms_first": {"word_embed_proj_dim": 33},
    "wide": {"word_embed_proj_dim": 130, "tie_word_embeddings": False, "num_attention_heads": 1},
    "no_final_norm": {"_remove_final_layer_norm": True, "num_attention_heads": 2, "num_hidden_layers": 1},
}


def write(folder: Path, **overrides: Any) -> Path:
    return tiny_checkpoint(folder, OPTConfig, {**FIELDS, **overrides})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(write(tmp_path, **VARIANTS[variant])).assert_parity(kernels, num_shuffles=1)


@pytest.mark.parametrize("variant", ["norms_first", "opt-350m", "galactica"])
def test_ranks_and_stages(variant: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **VARIANTS[variant])
    assert_ranks_agree(folder)
    assert_stages_agree(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(write(tmp_path, **OPT_350M), dtype)


def test_an_export_of_the_decoder_alone(kernels: Kernels, tmp_path: Path) -> None:
    """As opt-125m was published: without "model." and with the tied head's copy."""
    case = Case(write(tmp_path))
    path = tmp_path / "model.safetensors"
    weights = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    weights["lm_head.weight"] = weights["decoder.embed_tokens.weight"].clone()
    save_file(weights, path)
    case.assert_parity(kernels, num_shuffles=0)


def test_only_the_positions_that_are_served_are_held(tmp_path: Path) -> None:
    model = load_model(write(tmp_path), dtype="float32", max_model_len=100)
    table = model.positions._table  # type: ignore[attr-defined]
    stored = load_file(tmp_path / "model.safetensors")["model.decoder.embed_positions.weight"]
    assert torch.equal(table, stored[2:102])


def test_a_projection_counts_where_it_is_read(tmp_path: Path) -> None:
    """opt-350m's two: 36 x 88 values, one on the first stage, one on the last."""
    narrow, wide = (write(tmp_path / name, word_embed_proj_dim=size) for name, size in (("a", 36), ("b", 88)))
    first, last = (
        [load_model(folder, dtype="float32", stages=Stages(index, 2)).weight_bytes for folder in (narrow, wide)]
        for index in (0, 1)
    )
    assert first[0] - first[1] == 36 * 88 * 4
    assert last[0] - last[1] == 36 * 88 * 4 - (88 - 36) * 131 * 4  # the head is narrower


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads .*; got 88 and 3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be one of 4; got 2"),
        ({"head_dim": 10}, "head_dim must be one of 22; got 10"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim must be an integer from 1 to .*; got 0"),
        ({"activation_function": "quick_gelu"}, "activation_function must be one of .*; got 'quick_gelu'"),
        ({"do_layer_norm_before": "yes"}, "do_layer_norm_before must be true or false; got 'yes'"),
        ({"ffn_dim": None}, "ffn_dim is missing"),
        ({"eos_token_id": 131}, "eos_token_id must hold token ids from 0 to 130; got 131"),
    ],
)
def test_what_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parse_config(Fields({"model_type": "opt", **FIELDS, **overrides}))
