"""Linear layers: right by tolerance, and the same bits for a row whatever else is computed (C4)."""

from __future__ import annotations

import pytest
import torch

from models.ops.cpu import CpuKernels
from models.ops.kernels import Kernels
from tests.models.ops.world import COMPILED, ORACLE, SERVING, as_multiplied, name_of, same_bits

SHAPES = [(1, 1), (31, 7), (32, 16), (33, 576), (100, 131), (576, 576), (17, 4097), (960, 64)]
WEIGHTS = [torch.bfloat16, torch.float16, torch.float32]

each_set = pytest.mark.parametrize("kernels", SERVING, ids=name_of)
each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)


def make(
    out_features: int, in_features: int, rows: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    return torch.randn(rows, in_features, generator=generator), weight, torch.randn(out_features, generator=generator)


@each_set
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = make(*shape, rows=14, dtype=dtype)
    packed = kernels.pack(weight)
    assert (packed.out_features, packed.in_features, packed.dtype) == (*shape, dtype)
    residual = torch.ones(14, shape[0])
    plain, biased = kernels.linear(x, packed), kernels.linear(x, packed, bias)
    added = kernels.linear(x, packed, bias, residual)
    wanted = as_multiplied(kernels, x, weight).double() @ weight.double().T
    tolerance = 2e-6 * float(x.abs().double().matmul(weight.abs().double().T).max())
    torch.testing.assert_close(plain.double(), wanted, atol=tolerance, rtol=0)
    torch.testing.assert_close(biased.double(), wanted + bias, atol=tolerance, rtol=0)
    torch.testing.assert_close(added.double(), wanted + bias + 1, atol=tolerance, rtol=0)
    assert added is residual


@each_set
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", [(576, 576), (33, 131)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = make(*shape, rows=256, dtype=dtype)
    packed = kernels.pack(weight)
    whole = kernels.linear(x, packed, bias)
    for rows in [*range(1, 41), 64, 69, 70]:
        for first in {0, 3 * rows % 7, 256 - rows}:
            part = kernels.linear(x[first : first + rows].contiguous(), packed, bias)
            assert same_bits(part, whole[first : first + rows]), (rows, first)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    assert same_bits(kernels.linear(x[order].contiguous(), packed, bias), whole[order])
    assert kernels.is_exact


@each_compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 13, 200])
def test_threads_do_not_change_bits(kernels: CpuKernels, rows: int, dtype: torch.dtype) -> None:
    x, weight, _ = make(1000, 300, rows, dtype)
    packed = kernels.pack(weight)
    results = []
    for num_threads in (1, 2, 3, 7):
        kernels.set_num_threads(num_threads)
        results.append(kernels.linear(x, packed))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.skipif(len(COMPILED) < 3, reason="needs two instruction sets with FMA")
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_instruction_sets_with_fma_agree(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A dot of bf16 pairs is two roundings in the order of k: the very chain of FMAs, where x is bf16 already."""
    x, weight, bias = make(*shape, rows=20, dtype=dtype)
    first, *others = (kernels.linear(x.bfloat16().float(), kernels.pack(weight), bias) for kernels in COMPILED[1:])
    assert all(same_bits(other, first) for other in others)


@each_compiled
def test_activations_are_rounded_to_nearest_even(kernels: CpuKernels) -> None:
    """By the kernels that round them, and by them alone."""
    exact = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3e38, 257.0]
    x = torch.tensor(exact).unsqueeze(1)
    got = kernels.linear(x, kernels.pack(torch.ones(1, 1, dtype=torch.bfloat16))).flatten()
    rounded = [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0, float(torch.tensor(3e38).bfloat16()), 256.0]
    assert got.tolist() == (rounded if kernels.rounds_activations else x.flatten().tolist())


@each_compiled
def test_denormals(kernels: CpuKernels) -> None:
    """The bf16 dot product takes them for zero, whatever the modes of the thread; an FMA does not."""
    x, weight = torch.tensor([[1e-40, 2.0**-100]]), torch.tensor([[2.0**100, 1.0], [0.0, 2.0**-40]])
    got = kernels.linear(x, kernels.pack(weight.bfloat16())).flatten()
    exact = (x.double() @ weight.double().T).flatten()
    if kernels.rounds_activations:
        exact = torch.tensor([2.0**-100, 0.0], dtype=torch.float64)
    torch.testing.assert_close(got.double(), exact, atol=0, rtol=1e-6)


@each_compiled
def test_packed_weights_lie_apart_on_cache_lines(kernels: CpuKernels) -> None:
    """They share chunks of 32 MiB, or have one of their own; some shapes leave odd remainders."""
    shapes = [(1, 1), (33, 7), (4096, 3000), (4096, 3000), (5000, 4000), (33, 7), (1, 3)]
    packed = [kernels.pack(torch.full(shape, float(i)).bfloat16()) for i, shape in enumerate(shapes)]
    assert all(weight.data.data_ptr() % 64 == 0 for weight in packed)
    for i, weight in enumerate(packed):
        used = weight.data.float().sum().item()
        assert used == i * shapes[i][0] * shapes[i][1], "overwritten by a neighbour"


@each_compiled
def test_a_chain_runs_in_the_order_of_k(kernels: CpuKernels) -> None:
    """2^24 + 1 + ... + 1 - 2^24: each 1 is lost after 2^24 and kept before it. The last two are one pair."""
    ones = [1.0] * 100
    x = torch.tensor([[2.0**24, *ones, -(2.0**24)], [*ones, 2.0**24, -(2.0**24)]])
    for dtype in WEIGHTS:
        packed = kernels.pack(torch.ones(40, 102, dtype=dtype))
        assert kernels.linear(x, packed)[:, 39].tolist() == [0.0, 100.0]


@each_compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_weight_equals_its_fp32_copy(kernels: CpuKernels, dtype: torch.dtype) -> None:
    x, weight, bias = make(70, 50, 9, dtype)
    x = as_multiplied(kernels, x, weight)
    narrow, wide = kernels.pack(weight), kernels.pack(weight.float())
    assert narrow.data.dtype == dtype and wide.data.dtype == torch.float32
    assert narrow.num_bytes * 2 == wide.num_bytes
    assert same_bits(kernels.linear(x, narrow, bias.to(dtype)), kernels.linear(x, wide, bias.to(dtype).float()))


@each_compiled
def test_every_fp16_is_widened_exactly(kernels: CpuKernels) -> None:
    """All of them, denormals and infinities among them, as weights, biases and rows of a table."""
    every = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    is_number = ~every.isnan()
    packed = kernels.pack(every.view(-1, 1))
    for got in (
        kernels.linear(torch.ones(1, 1), packed)[0],
        kernels.linear(torch.zeros(2, 1), kernels.pack(torch.ones(2**16, 1)), every)[1],
        kernels.gather_rows(every.view(1, -1), torch.zeros(1, dtype=torch.int32))[0],
    ):
        assert torch.equal(got[is_number], every.float()[is_number])
        assert got[~is_number].isnan().all()


@each_set
def test_no_rows(kernels: Kernels) -> None:
    _, weight, _ = make(40, 8, 1)
    assert kernels.linear(torch.empty(0, 8), kernels.pack(weight)).shape == (0, 40)


@each_compiled
def test_infinities_stay_in_their_row(kernels: CpuKernels) -> None:
    x, weight, _ = make(40, 63, 12)
    x[5, 3], x[7, 62] = torch.inf, torch.nan
    got = kernels.linear(x, kernels.pack(weight))
    is_clean = got.isfinite().all(dim=1)
    assert is_clean.tolist() == [row not in (5, 7) for row in range(12)]


@each_compiled
def test_refuses_what_it_can_not_read(kernels: CpuKernels) -> None:
    x, weight, bias = make(40, 8, 2)
    packed = kernels.pack(weight)
    with pytest.raises(ValueError, match=r"x must be contiguous float32 \[tokens, 8\]; got torch.float64"):
        kernels.linear(x.double(), packed)
    with pytest.raises(ValueError, match=r"x must be .* \[2, 9\]"):
        kernels.linear(torch.empty(2, 9), packed)
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.linear(torch.empty(8, 2).T, packed)
    with pytest.raises(ValueError, match=r"bias must be contiguous \[40\]"):
        kernels.linear(x, packed, bias[:39])
    with pytest.raises(ValueError, match="bias must be float32, bfloat16 or float16"):
        kernels.linear(x, packed, bias.double())
    with pytest.raises(ValueError, match=r"residual must be contiguous float32 \[2, 40\]"):
        kernels.linear(x, packed, residual=torch.empty(3, 40))


def test_the_oracle_is_wide() -> None:
    x, weight, _ = make(10, 10, 3)
    assert ORACLE.linear(x.double(), ORACLE.pack(weight)).dtype == torch.float64
