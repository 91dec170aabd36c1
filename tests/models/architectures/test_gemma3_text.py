"""Gemma 3: local and global layers with rotary bases of their own, norms on both sides, soft caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3TextConfig

from models.architectures.gemma3_text import Gemma3ForCausalLM
from models.batch import Batch
from models.config import LinearScaling, Rotary
from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from models.registry import load_config, load_model
from tests.models.architectures.parity import SIZES, YARN, Case, transformers_logits
from tests.models.architectures.parsing import assert_refused, parsed
from tests.models.architectures.shares import BACKENDS, assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.tiny import tiny_checkpoint

ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "five_to_one": {"num_hidden_layers": 7, "sliding_window": 13, "query_pre_attn_scalar": 12},
    "two_to_one": {"sliding_window_pattern": 3, "sliding_window": 5, "rope_parameters": ROPE, "attention_bias": True},
    "layer_types": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 37,
        "rope_parameters": {**ROPE, "full_attention": YARN},
        "num_key_value_heads": 8,
    },
    "all_global": {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": False},
    "final_cap": {"final_logit_softcapping": 0.5, "sliding_window": 20, "query_pre_attn_scalar": 100},
    "silu": {"hidden_activation": "silu", "sliding_window": 8},
    "exact_gelu": {"hidden_activation": "gelu", "sliding_window": 8, "hidden_size": 88, "head_dim": 18},
}
SIZES_OF_GEMMA = {**SIZES, "head_dim": 16, "pad_token_id": 0}


def folder(path: Path, **fields: Any) -> Path:
    return tiny_checkpoint(path, Gemma3TextConfig, {**SIZES_OF_GEMMA, **fields})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(folder(tmp_path, **VARIANTS[variant])).assert_parity(kernels)


def test_caps_of_scores(kernels: Kernels, tmp_path: Path) -> None:
    """transformers 5.23 reads the field and does not hand it to its attention, which honours it when told."""
    path = folder(tmp_path, attn_logit_softcapping=0.3, sliding_window=20, query_pre_attn_scalar=4)
    assert load_config(path).attention_softcap == 0.3
    Case(path, expected=transformers_logits(path, softcap=0.3)).assert_parity(kernels)


@pytest.mark.parametrize(("kind", "dtype"), BACKENDS)
def test_bits_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = folder(
        tmp_path, sliding_window=13, sliding_window_pattern=2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    )
    assert_invariant(path, dtype, kind)


def test_ranks_and_stages(tmp_path: Path) -> None:
    path = folder(tmp_path, **VARIANTS["five_to_one"], final_logit_softcapping=4.0)
    assert_ranks_agree(path)
    assert_stages_agree(path)


def test_embeddings_are_scaled_by_a_rounded_root(tmp_path: Path) -> None:
    """In bf16 sqrt(96) is 9.8125. transformers in bf16 rounds everything else, too; so this is compared by hand."""
    model = load_model(folder(tmp_path), dtype="bfloat16")
    assert isinstance(model, Gemma3ForCausalLM)
    assert model.embedding is not None
    none = torch.empty(0, dtype=torch.int32)
    ids = torch.tensor([5, 130], dtype=torch.int32)
    batch = Batch(ids, none, none, none, none, none, none, 1, 1)
    assert torch.equal(model.embed(batch), model.embedding(ids) * 9.8125)


def test_norms_add_one_in_fp32(tmp_path: Path) -> None:
    """Where activations are bf16, as on GPUs, as well: there 1.0048828125 would become 1.0078125."""
    path = folder(tmp_path, rms_norm_eps=1e-6)
    model = load_model(path, dtype="bfloat16", kernels=ReferenceKernels(torch.bfloat16))
    stored = load_file(path / "model.safetensors")["model.norm.weight"]
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (stored + 1)
    assert isinstance(model, Gemma3ForCausalLM)
    assert model.norm is not None
    assert torch.equal(model.norm(x), expected.bfloat16())


def test_rotary_settings_of_older_versions() -> None:
    sizes = {"model_type": "gemma3_text", **SIZES_OF_GEMMA}
    new = parsed({**sizes, "rope_parameters": ROPE})
    old = parsed(
        {
            **sizes,
            "rope_theta": 50000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
    )
    assert new == old
    assert new.rotary == Rotary(theta=50000.0, size=16, scaling=LinearScaling(factor=8.0))
    assert new.local_rotary == Rotary(theta=300.0, size=16)


def test_absent_fields_have_transformers_defaults() -> None:
    config = parsed({"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 7})
    assert config.windows == (4096, 4096, 4096, 4096, 4096, 0, 4096)
    assert (config.rotary, config.local_rotary) == (Rotary(theta=1e6, size=256), Rotary(theta=1e4, size=256))
    assert (config.scale, config.tie_word_embeddings, config.activation) == (1 / 16, True, "gelu_tanh")
    assert (config.attention_softcap, config.logits_softcap) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3"}, r"model_type 'gemma3' is not one of .*\(it also reads images"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be one of False; got True"),
        ({"sliding_window": None}, "sliding_attention layers, but sliding_window is not set"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer from 1 .*; got 0"),
        ({"rope_parameters": {"rope_type": "default"}}, "must hold full_attention and sliding_attention"),
        ({"rope_parameters": {**ROPE, "sliding_attention": 7}}, "rope_parameters: sliding_attention must be an object"),
        ({"rope_local_base_freq": -1}, "rope_local_base_freq must be a positive number; got -1"),
        ({"hidden_activation": "relu"}, "hidden_activation must be one of gelu_pytorch_tanh, .*; got 'relu'"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number; got 0"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number; got 0"),
    ],
)
def test_wrong_fields(change: dict[str, Any], words: str) -> None:
    assert_refused({"model_type": "gemma3_text", **SIZES_OF_GEMMA, **change}, words)
