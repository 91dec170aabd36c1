"""Qwen3's mixtures: normalised or not, in some layers only, under either name of their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from models.ops.kernels import Kernels
from models.registry import load_config
from tests.models.architectures.parity import SIZES, YARN, Case
from tests.models.architectures.parsing import assert_refused, parsed
from tests.models.architectures.shares import BACKENDS, assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

SIZES_OF_EXPERTS = {
    **SIZES,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 26,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as_they_are": {},
    "normalised": {"norm_topk_prob": True, "num_local_experts": 33, "num_experts_per_tok": 8},
    "every_second_layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "dense_layers": {"mlp_only_layers": [0, 2], "attention_bias": True, "norm_topk_prob": True},
    "window": {"use_sliding_window": True, "sliding_window": 10, "rope_parameters": YARN},
}


def folder(path: Path, variant: str) -> Path:
    return tiny_checkpoint(path, Qwen3MoeConfig, {**SIZES_OF_EXPERTS, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(folder(tmp_path, variant)).assert_parity(kernels)


@pytest.mark.parametrize(("kind", "dtype"), BACKENDS)
def test_bits_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(folder(tmp_path, "normalised"), dtype, kind)


def test_ranks_and_stages(tmp_path: Path) -> None:
    path = folder(tmp_path, "dense_layers")
    assert_ranks_agree(path)
    assert_stages_agree(path, 3)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_either_name(name: str) -> None:
    config = parsed({"model_type": "qwen3_moe", **SIZES, name: 17, "num_experts_per_tok": 3})
    assert config.experts is not None
    assert config.experts.num_experts == 17


def test_dense_layers(tmp_path: Path) -> None:
    experts = load_config(folder(tmp_path, "every_second_layer")).experts
    assert experts is not None
    assert experts.dense_layers == (0, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be at most num_local_experts 6; got 7"),
        ({"mlp_only_layers": [3]}, r"mlp_only_layers must hold layers from 0 to 2; got \[3\]"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must hold layers from 0 to 2; got 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer from 1 .*; got 0"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false; got 'yes'"),
        ({"moe_intermediate_size": 1.5}, "moe_intermediate_size must be an integer .*; got 1.5"),
    ],
)
def test_wrong_fields(change: dict[str, Any], words: str) -> None:
    assert_refused({"model_type": "qwen3_moe", **SIZES_OF_EXPERTS, **change}, words)
