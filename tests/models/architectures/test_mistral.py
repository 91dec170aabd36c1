"""Mistral: the window, and its absence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from models.ops.kernels import Kernels
from models.registry import load_config
from tests.models.architectures.parity import SIZES, Case
from tests.models.architectures.parsing import parsed
from tests.models.architectures.shares import BACKENDS, assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "window_within_a_block": {"sliding_window": 5},
    "window_of_one": {"sliding_window": 1},
    "window_across_blocks": {"sliding_window": 37, "num_key_value_heads": 8},
    "window_beyond_the_context": {"sliding_window": 4096},
    "no_window": {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 20},
}


def folder(path: Path, variant: str) -> Path:
    return tiny_checkpoint(path, MistralConfig, {**SIZES, **VARIANTS[variant]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(folder(tmp_path, variant)).assert_parity(kernels)


@pytest.mark.parametrize(("kind", "dtype"), BACKENDS)
def test_bits_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(folder(tmp_path, "window_across_blocks"), dtype, kind)


def test_ranks_and_stages(tmp_path: Path) -> None:
    path = folder(tmp_path, "window_across_blocks")
    assert_ranks_agree(path)
    assert_stages_agree(path)


def test_what_transformers_writes(tmp_path: Path) -> None:
    assert load_config(folder(tmp_path, "no_window")).windows == ()


def test_no_window_and_no_word_about_it_differ() -> None:
    sizes = {"model_type": "mistral", **SIZES}
    assert parsed(sizes).windows == (4096,) * 3  # transformers' default
    assert parsed({**sizes, "sliding_window": None}).windows == ()
