"""Shares, reductions and whole models divided among ranks and stages, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from models.config import ModelError
from models.kv_cache import KVCache
from models.parallel import Group, Stages, sum_in_order
from models.registry import CausalLM, load_model
from tests.models.paged import BLOCK_SIZE, Sequences
from tests.tiny import tiny_llama

T = TypeVar("T")


class Meeting:
    """A transport among threads: every rank lays its tensor down and takes all of them."""

    def __init__(self, size: int) -> None:
        self._slots: list[torch.Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def seat(self, rank: int) -> Seat:
        return Seat(self, rank)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[rank] = x.clone()
        self._barrier.wait()
        parts = list(self._slots)
        self._barrier.wait()
        return parts


class Seat:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self._rank = rank

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self._meeting.exchange(self._rank, x)

    def all_reduce(self, x: torch.Tensor) -> None:
        sum_in_order(self._meeting.exchange(self._rank, x), out=x)

    def close(self) -> None:
        """Nobody waits long here."""


def on_ranks(size: int, work: Callable[[Group], T]) -> list[T]:
    """Results of `work` on every rank of a group, each in a thread of its own."""
    meeting = Meeting(size)
    groups = [Group(rank, size, meeting.seat(rank) if size > 1 else None) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [future.result(timeout=120) for future in [pool.submit(work, group) for group in groups]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_reduce_has_the_same_bits_on_every_rank(size: int) -> None:
    """Parts chosen so that every other order of additions gives another sum."""
    parts = torch.tensor([[1e8, 3.0], [1.0, 1e-8], [-1e8, -3.0], [1.0, 1e-8]])[:size]
    results = on_ranks(size, lambda group: group.all_reduce(parts[group.rank].clone()))
    expected = parts[0].clone()
    for part in parts[1:]:
        expected = expected + part
    assert all(torch.equal(result, expected) for result in results)


def test_the_order_matters_for_these_parts() -> None:
    parts = list(torch.tensor([[1e8], [1.0], [-1e8], [1.0]]))
    reversed_sum = sum_in_order(parts[::-1], torch.empty(1))
    assert not torch.equal(sum_in_order(parts, torch.empty(1)), reversed_sum)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_gather_is_in_rank_order(size: int) -> None:
    results = on_ranks(size, lambda group: group.all_gather(torch.full((2, 1), float(group.rank))))
    expected = torch.arange(float(size)).expand(2, size)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("total", [1, 4, 97, 131])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_cover_everything_once(total: int, size: int) -> None:
    shares = on_ranks(size, lambda group: group.share(total))
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_heads_stay_with_the_kv_heads_that_they_read() -> None:
    for num_heads, num_kv_heads, size in [(8, 4, 2), (8, 2, 4), (8, 8, 4), (4, 1, 4)]:
        for heads, kv_heads in on_ranks(size, lambda group, q=num_heads, kv=num_kv_heads: group.heads(q, kv)):  # type: ignore[misc]
            per_kv = num_heads // num_kv_heads
            assert {head // per_kv for head in heads} == set(kv_heads)


@pytest.mark.parametrize(("heads", "words"), [((5, 1), "num_attention_heads 5"), ((6, 3), "num_key_value_heads 3")])
def test_heads_that_cannot_be_divided(heads: tuple[int, int], words: str) -> None:
    group = Group(0, 2, Meeting(2).seat(0))
    with pytest.raises(ModelError, match=f"{words} cannot be divided among 2 ranks"):
        group.heads(*heads)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"vocab_size": 9}, "vocab_size 9 cannot be divided among 4 ranks in parts of 3"),
        ({"vocab_size": 3, "eos_token_id": 0}, "vocab_size 3 cannot be divided among 4 ranks"),
        ({"intermediate_size": 3}, "intermediate_size 3 cannot be divided among 4 ranks"),
    ],
)
def test_every_rank_has_a_part_of_every_dimension(sizes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Refused by all ranks alike, and not by the one that would multiply nothing."""
    folder = tiny_llama(tmp_path, num_attention_heads=4, num_key_value_heads=4, **sizes)

    def refusal(group: Group) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(folder, dtype="float32", group=group)
        return str(caught.value)

    assert all(words in text for text in on_ranks(4, refusal))


def test_stages_cover_the_layers_once() -> None:
    for count in (1, 2, 3, 5):
        ranges = [Stages(index, count).layers(5) for index in range(count)]
        assert [i for own in ranges for i in own] == list(range(5))
    with pytest.raises(ModelError, match="num_hidden_layers 5 cannot be divided among 6 stages"):
        Stages(0, 6).layers(5)


def test_wrong_places_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be from 0 to 1; got 2"):
        Group(2, 2, Meeting(2).seat(0))
    with pytest.raises(ValueError, match="a group of 2 ranks needs a transport"):
        Group(0, 2)
    with pytest.raises(ValueError, match="stage index must be from 0 to 1; got 2"):
        Stages(2, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Odd vocabulary and intermediate size, biases, fewer KV heads than the largest group."""
    return tiny_llama(
        tmp_path,
        hidden_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )


def run(model: CausalLM, group: Group) -> torch.Tensor:
    with torch.inference_mode():
        ids = [torch.arange(40) * 3 % 131, torch.arange(7)]
        sequences = Sequences(model, ids, torch.float32, group=group)
        sequences.step([(0, 25)])
        sequences.step([(1, 7), (0, 14)])
        sequences.step([(0, 1)])
        return sequences.all_logits(0)


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_agree_with_one(folder: Path, size: int) -> None:
    expected = run(load_model(folder, dtype="float32"), Group())
    models = on_ranks(size, lambda group: load_model(folder, dtype="float32", group=group))
    assert sum(model.weight_bytes for model in models) < 1.5 * load_model(folder, dtype="float32").weight_bytes
    results = on_ranks(size, lambda group: run(models[group.rank], group))
    for result in results:
        assert result.shape == expected.shape  # the padded tail of the vocabulary is gone
        assert torch.equal(result, results[0])
        assert (result - expected).abs().max() <= 1e-4


def test_pipeline_stages_pass_the_residual_stream(folder: Path) -> None:
    whole = load_model(folder, dtype="float32")
    sequences = Sequences(whole, [torch.arange(33)], torch.float32)
    batch = sequences.batch([(0, 33)])
    with torch.inference_mode():
        expected = whole.forward(batch, sequences.kv_cache)
        hidden = None
        for index in range(3):
            stages = Stages(index, 3)
            part = load_model(folder, dtype="float32", stages=stages)
            cache = KVCache(part.config, part.kernels, sequences.kv_cache.num_blocks, BLOCK_SIZE, torch.float32, stages)
            hidden = part.forward(batch, cache, hidden)
        assert hidden is not None
        assert torch.equal(hidden, expected)


def test_a_later_stage_needs_the_residual_stream(folder: Path) -> None:
    sequences = Sequences(load_model(folder, dtype="float32"), [torch.arange(3)], torch.float32)
    part = load_model(folder, dtype="float32", stages=Stages(1, 2))
    with pytest.raises(ValueError, match="hidden_in is required"):
        part.forward(sequences.batch([(0, 3)]), sequences.kv_cache)
