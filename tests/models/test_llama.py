"""Logits equal transformers' on every variant, and do not depend on how the work was cut (C4, C7)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from models.ops.select import select_kernels
from models.registry import CausalLM, load_model
from tests.models.paged import Sequences, advance_at_random, inference_on_one_thread
from tests.tiny import LLAMA3_ROPE, tiny_llama

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_heads": {"num_key_value_heads": 5, "head_dim": 16},
    "grouped": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "theta_and_eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rms_norm_eps": 0.3},
    "one_layer": {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with inference_on_one_thread():
        yield


@pytest.fixture(scope="module", params=[ReferenceKernels.name, "served"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The oracle's, and those that serve on this machine."""
    if request.param == ReferenceKernels.name:
        return ReferenceKernels()
    return select_kernels(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, kernels: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CausalLM, LlamaForCausalLM]:
    """Our model and transformers', from one folder, in fp32."""
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"), **VARIANTS[request.param])
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load_model(folder, dtype="float32", kernels=kernels), theirs


def some_tokens(lengths: list[int], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 131, (length,), generator=generator) for length in lengths]


def expected_logits(theirs: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = theirs(ids.unsqueeze(0)).logits
    return logits[0]


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max().item() <= 1e-4


def test_whole_prompt(pair: tuple[CausalLM, LlamaForCausalLM]) -> None:
    model, theirs = pair
    for ids in some_tokens([2, 17, 200]):
        sequences = Sequences(model, [ids], torch.float32)
        sequences.step([(0, len(ids))])
        assert_close(sequences.all_logits(0), expected_logits(theirs, ids))


@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_and_mixed_batches(pair: tuple[CausalLM, LlamaForCausalLM], seed: int) -> None:
    """Decodes and chunks of several sequences share steps, at random sizes and in random order."""
    model, theirs = pair
    tokens = some_tokens([1, 15, 16, 33, 90], seed)
    sequences = Sequences(model, tokens, torch.float32, seed)
    advance_at_random(sequences, random.Random(seed), max_count=23)
    for sequence, ids in enumerate(tokens):
        assert_close(sequences.all_logits(sequence), expected_logits(theirs, ids))


def test_only_the_wanted_logits_are_computed(pair: tuple[CausalLM, LlamaForCausalLM]) -> None:
    model, theirs = pair
    (ids,) = some_tokens([20])
    sequences = Sequences(model, [ids], torch.float32)
    batch = sequences.batch([(0, 20)])
    batch.logits_indices = torch.tensor([19, 3], dtype=torch.int32)
    assert_close(model.forward(batch, sequences.kv_cache), expected_logits(theirs, ids)[[19, 3]])
    batch.logits_indices = torch.empty(0, dtype=torch.int32)
    assert model.forward(batch, sequences.kv_cache).shape == (0, model.logits_size)
