"""Bits do not depend on what else is computed, how a prompt is cut, or where its blocks lie (C4, C7)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from models.ops.kernels import Kernels
from models.ops.select import select_kernels
from models.registry import CausalLM, load_model
from tests.models.paged import Sequences, advance_at_random, inference_on_one_thread
from tests.tiny import LLAMA3_ROPE, tiny_llama

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 48, 75, 130]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with inference_on_one_thread():
        yield


def exact_kernels(kind: str, dtype: torch.dtype) -> Kernels:
    try:
        kernels = select_kernels(CPU, dtype, kind)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"{kind} kernels are not available: {error}")
    assert kernels.is_exact
    return kernels


@pytest.fixture(scope="module", params=["cpu", "tiled"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """Weights and KV in the same type."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("tiny"),
        num_attention_heads=6,
        hidden_size=96,
        num_key_value_heads=2,
        rope_parameters=LLAMA3_ROPE,
        attention_bias=True,
        mlp_bias=True,
    )
    model = load_model(folder, dtype=request.param, kernels=exact_kernels(kind, request.param))
    if not model.kernels.is_exact:  # the tiled set tries its BLAS on every weight
        pytest.skip(f"{kind} kernels are not exact on this machine")
    return model


@pytest.fixture(scope="module")
def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 131, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(model: CausalLM, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every sequence computed by itself in one step."""
    return [whole(model, ids) for ids in tokens]


def kv_dtype(model: CausalLM) -> torch.dtype:
    return model.weight_dtype


def whole(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    sequences = Sequences(model, [ids], kv_dtype(model))
    sequences.step([(0, len(ids))])
    return sequences.all_logits(0)


def assert_same_bits(sequences: Sequences, expected: list[torch.Tensor]) -> None:
    for i, logits in enumerate(expected):
        different = (sequences.all_logits(i).view(torch.int32) != logits.view(torch.int32)).any(dim=1)
        assert not different.any(), f"sequence of {len(logits)} tokens differs from position {different.int().argmax()}"


def test_decoded_step_by_step(model: CausalLM, tokens: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    for ids, expected in zip(tokens, alone, strict=True):
        sequences = Sequences(model, [ids], kv_dtype(model))
        for _ in range(len(ids)):
            sequences.step([(0, 1)])
        assert_same_bits(sequences, [expected])


def test_in_one_step_with_all_others(model: CausalLM, tokens: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    sequences = Sequences(model, tokens, kv_dtype(model), seed=5)
    sequences.step([(i, len(tokens[i])) for i in random.Random(5).sample(range(len(tokens)), len(tokens))])
    assert_same_bits(sequences, alone)


@pytest.mark.parametrize("seed", range(4))
def test_cut_at_random_among_decodes(
    model: CausalLM, tokens: list[torch.Tensor], alone: list[torch.Tensor], seed: int
) -> None:
    sequences = Sequences(model, tokens, kv_dtype(model), seed)
    advance_at_random(sequences, random.Random(seed), max_count=40)
    assert_same_bits(sequences, alone)


def test_one_of_thirty_two_rows(model: CausalLM, tokens: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    """A prompt's chunk, then 32 decodes a step: the rows' places and neighbours change every step."""
    chance = random.Random(7)
    crowd = [tokens[-1]] + [torch.randint(0, 131, (chance.randint(60, 130),)) for _ in range(31)]
    sequences = Sequences(model, crowd, kv_dtype(model), seed=7)
    for i, ids in enumerate(crowd):
        sequences.step([(i, len(ids) - 50 if i else 80)])
    for _ in range(50):
        sequences.step([(i, 1) for i in chance.sample(range(32), 32)])
    assert_same_bits(sequences, alone[-1:])


def test_recomputed_in_other_blocks(model: CausalLM, tokens: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    """As after a preemption: what was decoded is computed again as a prompt, elsewhere."""
    first = Sequences(model, tokens[-1:], kv_dtype(model), seed=1)
    first.step([(0, 40)])
    for _ in range(30):
        first.step([(0, 1)])
    again = Sequences(model, tokens[-1:], kv_dtype(model), seed=2)
    again.step([(0, 70)])
    again.step([(0, 60)])
    assert_same_bits(again, alone[-1:])
    assert torch.equal(first.all_logits(0), again.all_logits(0)[:70])


def test_which_logits_are_wanted(model: CausalLM, tokens: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    """The head sees as many rows as logits are wanted; prompts rarely want all of theirs."""
    for wanted in ([129], [3, 129], list(range(0, 130, 7))):
        sequences = Sequences(model, tokens[-1:], kv_dtype(model))
        batch = sequences.batch([(0, 130)])
        batch.logits_indices = torch.tensor(wanted, dtype=torch.int32)
        logits = model.forward(batch, sequences.kv_cache)
        assert torch.equal(logits, alone[-1][wanted])
