"""Qwen2: biases on q, k and v; windows that are there and not used; YaRN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from models.config import YarnScaling
from models.ops.kernels import Kernels
from models.registry import load_config
from tests.models.architectures.parity import SIZES, YARN, Case
from tests.models.architectures.parsing import assert_refused, parsed
from tests.models.architectures.shares import BACKENDS, assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 8, "num_hidden_layers": 1},
    "window_unused": {"sliding_window": 5, "max_window_layers": 0},
    "later_layers": {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    "layer_types": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "yarn": {"rope_parameters": YARN},
    "yarn_attention_factor": {"rope_parameters": {**YARN, "attention_factor": 1.7, "truncate": False}},
    "yarn_mscale": {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}},
    "yarn_one_mscale": {"rope_parameters": {**YARN, "mscale": 2.0, "beta_slow": 0.5}},
}


def folder(path: Path, variant: str) -> Path:
    return tiny_checkpoint(path, Qwen2Config, {**SIZES, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(folder(tmp_path, variant)).assert_parity(kernels)


@pytest.mark.parametrize(("kind", "dtype"), BACKENDS)
def test_bits_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(folder(tmp_path, "later_layers"), dtype, kind)


def test_ranks_and_stages(tmp_path: Path) -> None:
    path = folder(tmp_path, "layer_types")
    assert_ranks_agree(path)
    assert_stages_agree(path, 3)


def test_what_transformers_writes(tmp_path: Path) -> None:
    assert load_config(folder(tmp_path, "later_layers")).windows == (0, 21, 21)
    assert load_config(folder(tmp_path, "window_unused")).windows == ()


def test_yarn_as_the_model_cards_ask_for_it() -> None:
    """Added to a config.json that still says how far the model was trained; the context grows with it."""
    sizes = {"model_type": "qwen2", **SIZES, "max_position_embeddings": 32768, "rope_theta": 1000000.0}
    config = parsed(
        {**sizes, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    )
    assert config.rotary is not None
    assert config.rotary.scaling == YarnScaling(
        factor=4.0,
        attention_factor=0.1 * math.log(4.0) + 1.0,
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=32768,
    )
    assert config.max_position_embeddings == 131072
    assert parsed(sizes).max_position_embeddings == 32768


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_attention layers, but sliding_window is not set or not"),
        ({"layer_types": ["full_attention"]}, r"layer_types must be a list of 3; got \['full_attention'\]"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types must hold full_attention or .*; got 'chunked"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be an integer from 1 .*; got 0"),
        ({"use_sliding_window": 1}, "use_sliding_window must be true or false; got 1"),
        ({"max_window_layers": -1}, "max_window_layers must be an integer from 0 .*; got -1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be one of .*, yarn; got 'dynamic'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor must be at least 1 for yarn; got 0.5"),
        ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta must be above 1 for yarn; got 1"),
        ({"rope_parameters": {**YARN, "beta_fast": 0.5}}, "beta_fast must not be below beta_slow; got 0.5 and 1"),
        ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate must be true or false; got 1"),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters must be the same for all layers; got full_"),
    ],
)
def test_wrong_fields(change: dict[str, Any], words: str) -> None:
    assert_refused({"model_type": "qwen2", **SIZES, **change}, words)
