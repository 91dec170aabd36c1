"""One weight under two names, and what exports make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from models.ops.reference import ReferenceKernels
from tests.models.architectures.parity import Case
from tests.models.architectures.shares import assert_ranks_agree, assert_stages_agree
from tests.models.paged import inference_on_one_thread
from tests.tiny import LLAMA3_ROPE, tiny_checkpoint, tiny_llama

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with inference_on_one_thread():
        yield


def tied(path: Path, **fields: Any) -> Path:
    """As Llama 3.2 is."""
    return tiny_llama(
        path,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3_ROPE,
        **{"num_attention_heads": 4, "num_key_value_heads": 2, **fields},
    )


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return folder


def untie(weights: dict[str, torch.Tensor]) -> None:
    weights[HEAD] = weights[TABLE].flip(0).contiguous()


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "the_table": lambda weights: None,
    "a_copy": lambda weights: weights.update({HEAD: weights[TABLE].clone()}),
    "the_head_alone": lambda weights: weights.update({HEAD: weights.pop(TABLE)}),
    "two_weights": untie,
}


@pytest.mark.parametrize("name", CHANGES)
def test_exports_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    folder = rewrite(tied(tmp_path), CHANGES[name])
    Case(folder).assert_parity(ReferenceKernels(), num_shuffles=0)
    assert_ranks_agree(folder, (2,))
    assert_stages_agree(folder)


def test_two_weights_differ_from_one(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    one, two = Case(tied(tmp_path / "one")), Case(rewrite(tied(tmp_path / "two"), untie))
    assert not torch.allclose(one.expected[-1], two.expected[-1], atol=0.1)


def test_the_head_alone_without_a_prefix(tmp_path: Path) -> None:
    """What saves each shared tensor once may keep the name that sorts first, here after GPT-2's prefix has gone."""
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 131, "n_positions": 128, "initializer_range": 0.1}
    folder = tiny_checkpoint(tmp_path, GPT2Config, {**sizes, "bos_token_id": 0, "eos_token_id": 0})
    case = Case(folder)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for old in list(weights):
            weights[old.removeprefix("transformer.")] = weights.pop(old)
        weights[HEAD] = weights.pop("wte.weight")

    rewrite(folder, rename)
    case.assert_parity(ReferenceKernels(), num_shuffles=0)
