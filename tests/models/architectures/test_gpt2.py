"""GPT-2 against transformers; GPT-3's bands and heads against transformers with a mask, and against plain torch."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from models.config import ModelError
from models.fields import Fields
from models.ops.kernels import Kernels
from models.registry import load_config, parse_config
from tests.models.architectures.parity import Case
from tests.models.architectures.shares import assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

FIELDS: dict[str, Any] = {
    "n_embd": 88,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 200,
    "vocab_size": 131,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "n_inner": 97, "layer_norm_epsilon": 0.1},
    "relu": {"activation_function": "relu", "n_head": 2},
    "gelu": {"activation_function": "gelu", "n_head": 11},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled": {"scale_attn_weights": False, "n_layer": 1, "activation_function": "silu"},
    "scaled_by_layer_alone": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_head": 1},
}
BANDED: dict[str, Any] = {"attention_pattern": ["dense", "banded"], "attention_window": 9}
LENGTHS = (2, 33, 90)


def write(folder: Path, **overrides: Any) -> Path:
    return tiny_checkpoint(folder, GPT2Config, {**FIELDS, **overrides})


def amend(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(write(tmp_path, **VARIANTS[variant])).assert_parity(kernels, num_shuffles=1)


def test_an_export_without_a_prefix(kernels: Kernels, tmp_path: Path) -> None:
    """As gpt2 was published: no "transformer.", and the masks among the weights."""
    case = Case(write(tmp_path))
    path = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 200, 200).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, path)
    case.assert_parity(kernels, num_shuffles=0)


def write_gpt3(folder: Path, head_size: int) -> Path:
    """Alternating bands and heads of any size: a GPT-2 whose attention weights are replaced."""
    write(folder, n_inner=97)
    amend(folder, head_dim=head_size, **BANDED)
    path = folder / "model.safetensors"
    weights, inner = load_file(path), 4 * head_size
    generator = torch.Generator().manual_seed(5)
    for i in range(3):
        for name, shape in {
            "c_attn.weight": (88, 3 * inner),
            "c_attn.bias": (3 * inner,),
            "c_proj.weight": (inner, 88),
        }.items():
            weights[f"transformer.h.{i}.attn.{name}"] = 0.1 * torch.randn(shape, generator=generator)
    save_file(weights, path)
    return folder


def expected_gpt3(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Plain torch over the stored weights. Layer 1 of 3 is banded: a token sees itself and 8 before it."""
    weights = {
        name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
    }

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (88,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length = len(ids)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:length]
    for i in range(3):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = qkv.view(length, 3, 4, -1).permute(1, 2, 0, 3)
        hidden = (distance < 0) | (distance >= (9 if i == 1 else length))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(mixed, f"h.{i}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


@pytest.mark.parametrize("head_size", [10, 22, 48])
def test_gpt3s_heads_and_bands(head_size: int, kernels: Kernels, tmp_path: Path) -> None:
    folder = write_gpt3(tmp_path, head_size)
    assert load_config(folder).windows == (0, 9, 0)
    Case(folder, LENGTHS, functools.partial(expected_gpt3, folder)).assert_parity(kernels)


def test_bands_are_transformers_attention_under_a_mask(kernels: Kernels, tmp_path: Path) -> None:
    """All layers banded: transformers computes the same when it is given the mask."""
    theirs = GPT2LMHeadModel.from_pretrained(write(tmp_path), dtype=torch.float32, attn_implementation="eager").eval()

    def banded(ids: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= 9), -torch.inf)
        logits: torch.Tensor = theirs(ids[None], attention_mask=mask[None, None], use_cache=False).logits[0]
        return logits

    amend(tmp_path, attention_pattern=["banded"], attention_window=9)
    Case(tmp_path, LENGTHS, banded).assert_parity(kernels)


@pytest.mark.parametrize("head_size", [22, 32])
def test_ranks_and_stages(head_size: int, tmp_path: Path) -> None:
    folder = write_gpt3(tmp_path, head_size)
    assert_ranks_agree(folder)
    assert_stages_agree(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(write_gpt3(tmp_path, 32), dtype)


def test_patterns_repeat() -> None:
    def windows(**overrides: Any) -> tuple[int, ...]:
        return parse_config(Fields({"model_type": "gpt2", **FIELDS, "n_layer": 5, **overrides})).windows

    assert windows() == ()
    assert windows(attention_pattern=["dense"]) == ()
    assert windows(**BANDED) == (0, 9, 0, 9, 0)
    assert windows(attention_pattern=["banded", "dense", "dense"], attention_window=2) == (2, 0, 0, 2, 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"n_head": 3}, "n_embd must be a multiple of n_head when head_dim is absent; got 88 and 3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be one of 4; got 2"),
        ({"add_cross_attention": True}, "add_cross_attention must be one of False; got True"),
        ({"activation_function": "tanh"}, "activation_function must be one of .*; got 'tanh'"),
        ({"n_positions": 0}, "n_positions must be an integer from 1 to .*; got 0"),
        ({"attention_pattern": "banded"}, "attention_pattern must hold 1 to 3 times dense or banded; got 'banded'"),
        ({"attention_pattern": []}, r"attention_pattern must hold 1 to 3 times .*; got \[\]"),
        ({"attention_pattern": ["dense"] * 4}, "attention_pattern must hold 1 to 3 times"),
        ({"attention_pattern": ["dense", {}]}, "attention_pattern must hold 1 to 3 times"),
        ({"attention_pattern": ["banded"]}, "attention_window is missing"),
        ({**BANDED, "attention_window": 0}, "attention_window must be an integer from 1 to .*; got 0"),
    ],
)
def test_what_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parse_config(Fields({"model_type": "gpt2", **FIELDS, **overrides}))
