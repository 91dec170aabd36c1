"""The default model: real weights, real depth, real text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from models.registry import load_model
from models.store import pull
from tests.models.paged import Sequences, advance_at_random

pytestmark = pytest.mark.model

TEXT = """A ship is safe in harbour, but that is not what ships are for. def area(r): return 3.14159 * r ** 2
La mer est calme ce soir; 在海上，船只 must keep a watch. 1, 1, 2, 3, 5, 8, 13, 21, 34, 55"""


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pull("smollm2-135m-instruct", store=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def ids(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])


def test_logits_are_transformers(folder: Path, ids: torch.Tensor) -> None:
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = theirs(ids.unsqueeze(0)).logits[0]
    model = load_model(folder, dtype="float32")
    assert model.num_parameters == 134_515_008
    sequences = Sequences(model, [ids], torch.float32)
    advance_at_random(sequences, random.Random(0), max_count=40)
    assert (sequences.all_logits(0) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bits_are_the_same_alone_chunked_and_in_company(folder: Path, ids: torch.Tensor) -> None:
    model = load_model(folder, dtype="bfloat16")
    alone = Sequences(model, [ids], torch.bfloat16)
    alone.step([(0, len(ids))])
    tokens = [ids, ids.flip(0), ids[:50], ids[20:], ids[:1]]
    company = Sequences(model, tokens, torch.bfloat16, seed=1)
    advance_at_random(company, random.Random(1), max_count=30)
    assert torch.equal(company.all_logits(0), alone.all_logits(0))
    assert torch.equal(company.all_logits(2), alone.all_logits(0)[:50])
