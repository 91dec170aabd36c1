"""Qwen3: every head of q and k is normalised; heads as wide as they like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from models.ops.kernels import Kernels
from tests.models.architectures.parity import SIZES, YARN, Case
from tests.models.architectures.parsing import parsed
from tests.models.architectures.shares import BACKENDS, assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "narrow_heads": {"head_dim": 6},
    "wide_heads": {"head_dim": 40, "tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "biases": {"head_dim": 16, "attention_bias": True},
    "odd_heads": {"head_dim": 10, "hidden_size": 50, "num_attention_heads": 9, "num_key_value_heads": 3},
    "windows": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "yarn": {"head_dim": 32, "rope_parameters": YARN},
}


def folder(path: Path, variant: str) -> Path:
    return tiny_checkpoint(path, Qwen3Config, {**SIZES, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(folder(tmp_path, variant)).assert_parity(kernels)


@pytest.mark.parametrize(("kind", "dtype"), BACKENDS)
def test_bits_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(folder(tmp_path, "windows"), dtype, kind)


def test_ranks_and_stages(tmp_path: Path) -> None:
    path = folder(tmp_path, "biases")
    assert_ranks_agree(path)
    assert_stages_agree(path)


def test_absent_fields_have_transformers_defaults() -> None:
    config = parsed({"model_type": "qwen3", **SIZES, "hidden_size": 100, "max_position_embeddings": None})
    assert (config.head_size, config.max_position_embeddings) == (128, 32768)
