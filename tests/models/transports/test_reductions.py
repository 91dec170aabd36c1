"""All-reduce and all-gather among real processes: the same bits everywhere (C4)."""

from __future__ import annotations

import random

import pytest
import torch

from models.parallel import sum_in_order
from models.transports.connect import Ranks
from tests.models.transports.processes import Pool

SLOT_BYTES = 1 << 16
"""Small, so that ordinary tensors go in pieces."""

Case = tuple[list[int], torch.dtype, bool]
"""Shape, dtype, and whether the tensor is a transposed view."""


def random_cases(seed: int, count: int) -> list[Case]:
    chance = random.Random(seed)
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    cases: list[Case] = [([0, 7], torch.float32, False), ([1, 1], torch.float32, False)]
    for _ in range(count):
        shape = [chance.choice([1, 2, 3, 17, 64, 129]), chance.choice([1, 5, 64, 577, 1024])]
        cases.append((shape, chance.choice(dtypes), chance.random() < 0.3))
    return cases


def tensor_of(rank: int, index: int, case: Case) -> torch.Tensor:
    """Values of very unequal sizes, down to denormals: another order of additions gives other bits."""
    shape, dtype, is_transposed = case
    generator = torch.Generator().manual_seed(1000 * index + rank)
    exponents = torch.randint(-149, 12, shape, generator=generator) * torch.randint(0, 2, shape, generator=generator)
    x = (torch.randn(shape, generator=generator) * torch.exp2(exponents.float())).to(dtype)
    return x.t().contiguous().t() if is_transposed else x


def reduce_all(ranks: Ranks, rank: int, cases: list[Case]) -> list[bytes]:
    return [bits(ranks.group.all_reduce(tensor_of(rank, index, case))) for index, case in enumerate(cases)]


def gather_all(ranks: Ranks, rank: int, cases: list[Case]) -> list[bytes]:
    return [bits(ranks.group.all_gather(tensor_of(rank, index, case))) for index, case in enumerate(cases)]


def bits(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("kind", ["shared-memory", "gloo"])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_every_rank_and_transport_has_the_bits_of_the_sum_in_rank_order(pool: Pool, kind: str, tp: int) -> None:
    cases = random_cases(seed=tp, count=30)
    gang = pool.connect(kind, tp=tp, slot_bytes=SLOT_BYTES)
    for rank, process in enumerate(gang.ranks):
        process.start(reduce_all, (rank, cases))
    sums = [process.result() for process in gang.ranks]
    for index, case in enumerate(cases):
        parts = [tensor_of(rank, index, case) for rank in range(tp)]
        expected = bits(sum_in_order(parts, torch.empty_like(parts[0])))
        assert {own[index] for own in sums} == {expected}, case


@pytest.mark.parametrize("kind", ["shared-memory", "gloo"])
def test_a_gather_is_in_rank_order(pool: Pool, kind: str) -> None:
    cases = random_cases(seed=9, count=12)
    gang = pool.connect(kind, tp=3, slot_bytes=SLOT_BYTES)
    for rank, process in enumerate(gang.ranks):
        process.start(gather_all, (rank, cases))
    gathered = [process.result() for process in gang.ranks]
    for index, case in enumerate(cases):
        expected = bits(torch.cat([tensor_of(rank, index, case) for rank in range(3)], dim=-1))
        assert {own[index] for own in gathered} == {expected}, case


def reduce_often(ranks: Ranks, rank: int, times: int) -> float:
    """Repeats overwrite the slots of two steps before while neighbours may still read those of the last."""
    x = torch.full((4, 64), float(rank + 1))
    for _ in range(times):
        ranks.group.all_reduce(x)
        x /= ranks.group.size
    return float(x.double().mean())


def test_thousands_of_reductions_in_a_row(pool: Pool) -> None:
    gang = pool.connect("shared-memory", tp=4, slot_bytes=SLOT_BYTES)
    for rank, process in enumerate(gang.ranks):
        process.start(reduce_often, (rank, 1000))
    assert [process.result() for process in gang.ranks] == [2.5] * 4


def reduce_in_stages(ranks: Ranks, rank: int) -> list[float]:
    return [float(value) for value in ranks.group.all_reduce(torch.full((1, 3), 10.0**rank))[0]]


@pytest.mark.parametrize("kind", ["shared-memory", "gloo"])
def test_the_groups_of_two_stages_do_not_mix(pool: Pool, kind: str) -> None:
    """World rank = stage * tensor-parallel size + place."""
    gang = pool.connect(kind, tp=2, pp=2)
    for rank, process in enumerate(gang.ranks):
        process.start(reduce_in_stages, (rank,))
    assert [process.result() for process in gang.ranks] == [[11.0] * 3] * 2 + [[1100.0] * 3] * 2
