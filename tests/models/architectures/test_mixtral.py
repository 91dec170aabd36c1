"""Mixtral: experts in every layer, in both of the layouts in which they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from models.checkpoint import Checkpoint
from models.config import ModelError
from models.ops.kernels import Kernels
from models.parallel import Group
from models.registry import CausalLM, build_model, load_config, load_model
from tests.models.architectures.parity import SIZES, Case, some_tokens
from tests.models.architectures.parsing import assert_refused, parsed
from tests.models.architectures.shares import BACKENDS, assert_invariant, assert_ranks_agree, assert_stages_agree
from tests.models.paged import Sequences
from tests.models.test_parallel import on_ranks
from tests.tiny import tiny_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "two_of_eight": {},
    "three_of_five": {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 11},
    "all_of_three": {"num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "one_of_four": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 20, "num_key_value_heads": 8},
    "multiples_of_32": {"intermediate_size": 64, "num_local_experts": 5, "num_experts_per_tok": 3},
    "a_single_one": {"num_local_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1},
}


def folder(path: Path, variant: str) -> Path:
    return tiny_checkpoint(path, MixtralConfig, {**SIZES, "rms_norm_eps": 1e-5, **VARIANTS[variant]})


def stacked_folder(path: Path, variant: str) -> Path:
    """The same model with the experts of a layer in one tensor, as transformers 5 holds them in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder(path / "separate", variant), dtype=torch.float32)
    model.save_pretrained(path / "stacked", save_original_format=False)
    return path / "stacked"


def logits(model: CausalLM) -> torch.Tensor:
    sequences = Sequences(model, some_tokens([20], model.config.vocab_size), torch.float32)
    sequences.step([(0, 20)])
    return sequences.all_logits(0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(folder(tmp_path, variant)).assert_parity(kernels)


@pytest.mark.parametrize(("kind", "dtype"), BACKENDS)
def test_bits_do_not_depend_on_the_batch(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_invariant(folder(tmp_path, "three_of_five"), dtype, kind)


@pytest.mark.parametrize("variant", ["two_of_eight", "three_of_five"])
def test_ranks_and_stages(variant: str, tmp_path: Path) -> None:
    """Five experts among two and four ranks: the ranges are unequal."""
    path = folder(tmp_path, variant)
    assert_ranks_agree(path)
    assert_stages_agree(path)


def test_more_ranks_than_experts(tmp_path: Path) -> None:
    assert_ranks_agree(folder(tmp_path, "all_of_three"), (4,))


def test_stacked_experts_are_the_same_model(tmp_path: Path, kernels: Kernels) -> None:
    stacked = stacked_folder(tmp_path, "three_of_five")
    with Checkpoint(stacked) as checkpoint:
        assert checkpoint.has("model.layers.0.mlp.experts.gate_up_proj")
    Case(stacked).assert_parity(kernels)
    separate = load_model(tmp_path / "separate", dtype="float32")
    assert load_model(stacked, dtype="float32").num_parameters == separate.num_parameters


@pytest.mark.parametrize("is_stacked", [False, True])
def test_packed_experts_are_kept_for_the_next_start(tmp_path: Path, is_stacked: bool) -> None:
    path = (stacked_folder if is_stacked else folder)(tmp_path, "three_of_five")
    loads: list[Path] = []

    def start() -> torch.Tensor:
        model = load_model(path, dtype="float32", cache_dir=tmp_path / "cache", run_later=lambda work: work())
        loads.extend((tmp_path / "cache").glob("*/*"))
        return logits(model)

    assert torch.equal(start(), start())
    assert loads  # something was kept


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("is_stacked", [False, True])
def test_experts_in_other_formats(quantization: str, is_stacked: bool, tmp_path: Path) -> None:
    """Near the unquantised model, whose router they share; the same from both layouts, and on ranks."""
    path = (stacked_folder if is_stacked else folder)(tmp_path, "multiples_of_32")
    plain = load_model(path, dtype="float32")
    model = load_model(path, dtype="float32", quantization=quantization)
    assert model.weight_bytes < plain.weight_bytes / 2
    error = (logits(model) - logits(plain)).std() / logits(plain).std()
    assert 0 < error < {"int8": 0.1, "int4": 0.5}[quantization]
    for rank in on_ranks(2, lambda group: load_model(path, dtype="float32", quantization=quantization, group=group)):
        assert rank.num_parameters == plain.num_parameters


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_rank_reads_its_own_experts(tmp_path: Path, is_stacked: bool) -> None:
    """Of eight experts two ranks read four each. Both read norms and routers, one of them everything else."""
    path = (stacked_folder if is_stacked else folder)(tmp_path, "two_of_eight")

    def bytes_read(group: Group) -> int:
        with Checkpoint(path) as checkpoint:
            build_model(load_config(path), checkpoint, dtype="float32", group=group)
            checkpoint.finish()
            return checkpoint.bytes_read

    row_bytes = 4 * SIZES["hidden_size"]
    norms_and_routers = (3 * (2 + 8) + 1) * row_bytes
    halves = on_ranks(2, bytes_read)
    assert sum(halves) == bytes_read(Group()) + norms_and_routers
    assert max(halves) - min(halves) == 2 * row_bytes  # of embedding and head: the vocabulary is odd


def test_weight_bytes_are_what_one_token_reads(tmp_path: Path) -> None:
    """Two of eight experts per layer; the other six are in memory only."""
    config = load_config(folder(tmp_path, "two_of_eight"))
    model = load_model(tmp_path, dtype="float32")
    embedding = config.vocab_size * config.hidden_size
    unread = 3 * (8 - 2) * 3 * config.hidden_size * config.intermediate_size
    assert model.weight_bytes == 4 * (model.num_parameters - embedding - unread)


def test_absent_fields_have_transformers_defaults() -> None:
    config = parsed({"model_type": "mixtral", **SIZES})
    assert config.experts is not None
    assert (config.experts.num_experts, config.experts.num_experts_per_token) == (8, 2)
    assert config.experts.is_normalised
    assert config.rotary is not None
    assert (config.rotary.theta, config.norm_eps, config.windows) == (1e6, 1e-5, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most num_local_experts 8; got 9"),
        ({"num_local_experts": 0}, "num_local_experts must be an integer from 1 .*; got 0"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu; got 'relu'"),
    ],
)
def test_wrong_fields(change: dict[str, Any], words: str) -> None:
    assert_refused({"model_type": "mixtral", **SIZES, **change}, words)


def test_more_experts_than_there_are(tmp_path: Path) -> None:
    """Said before anything is read."""
    path = folder(tmp_path, "two_of_eight")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts": 8', '"num_local_experts": 9'))
    with pytest.raises(ModelError, match=r"block_sparse_moe.gate.weight must have shape \[9, 96\]; got \[8, 96\]"):
        load_model(path)
