"""Linears with int8 and int4 weights: right by tolerance, and the same bits whatever else is computed (C4)."""

from __future__ import annotations

import pytest
import torch

from models.ops.codes import code_activations, join_codes, round_int4, round_int8, split_codes
from models.ops.cpu import CpuKernels
from models.ops.kernels import GROUP_SIZE, INT8_SPAN, Kernels, PackedLinear
from tests.models.ops.world import COMPILED, ORACLE, SERVING, name_of, same_bits

FORMATS = ["int8", "int4", "symmetric int4"]
SHAPES = [(1, 32), (31, 64), (33, 96), (100, 160), (64, 576), (17, 4128)]
each_set = pytest.mark.parametrize("kernels", SERVING, ids=name_of)
each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)
each_format = pytest.mark.parametrize("format", FORMATS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(kernels: Kernels, weight: torch.Tensor, format: str) -> PackedLinear:
    """`weight` rounded to the format; symmetric int4 has the codes of int4 and other values."""
    packed = kernels.empty_packed(*weight.shape, weight.dtype, format.rpartition(" ")[2], format == "int4")
    if format == "symmetric int4":
        codes, scales, _ = round_int4(weight)
        kernels.pack_codes(packed, 0, codes, scales, None)
    else:
        kernels.pack_rows(packed, 0, weight)
    return packed


@each_set
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(kernels: Kernels, shape: tuple[int, int], format: str) -> None:
    weight, x, bias = normal(*shape), normal(14, shape[1], seed=1), normal(shape[0], seed=2)
    packed, exact = pack(kernels, weight, format), pack(ORACLE, weight, format)
    residual = torch.ones(14, shape[0])
    plain, biased = kernels.linear(x, packed), kernels.linear(x, packed, bias)
    added = kernels.linear(x, packed, bias, residual)
    wanted = ORACLE.linear(x.double(), exact)
    tolerance = 2e-6 * float(x.abs().double().matmul(weight.abs().double().T).max())
    torch.testing.assert_close(plain.double(), wanted, atol=tolerance, rtol=0)
    torch.testing.assert_close(biased.double(), wanted + bias, atol=tolerance, rtol=0)
    torch.testing.assert_close(added.double(), wanted + bias + 1, atol=tolerance, rtol=0)
    assert added is residual
    assert packed.num_bytes == exact.num_bytes


@each_set
@pytest.mark.parametrize("width", [1, 3, 31, 63, 65, 131])
def test_int8_takes_any_number_of_inputs(kernels: Kernels, width: int) -> None:
    weight, x = normal(40, width), normal(9, width, seed=1)
    wanted = ORACLE.linear(x.double(), pack(ORACLE, weight, "int8"))
    torch.testing.assert_close(kernels.linear(x, pack(kernels, weight, "int8")).double(), wanted, atol=1e-4, rtol=0)


def test_the_oracle_is_near_the_weights() -> None:
    """Within what rounding may cost, so that no scale is lost on the way."""
    weight, x = normal(200, 512), normal(50, 512, seed=1)
    wanted = x @ weight.T
    for format, allowed in (("int8", 0.02), ("int4", 0.12)):
        error = ORACLE.linear(x.double(), pack(ORACLE, weight, format)) - wanted
        assert float(error.square().mean().sqrt()) < allowed * float(wanted.square().mean().sqrt())


@each_set
@each_format
@pytest.mark.parametrize("shape", [(576, 576), (33, 160)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(kernels: Kernels, shape: tuple[int, int], format: str) -> None:
    x, bias = normal(200, shape[1], seed=1), normal(shape[0], seed=2)
    packed = pack(kernels, normal(*shape), format)
    whole = kernels.linear(x, packed, bias)
    sizes = [*range(1, 33), 47, 64, 65] if isinstance(kernels, CpuKernels) else [1, 2, 15, 16, 17]
    for rows in sizes:
        for first in {0, 3 * rows % 7, 200 - rows}:
            part = kernels.linear(x[first : first + rows].contiguous(), packed, bias)
            assert same_bits(part, whole[first : first + rows]), (rows, first)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert same_bits(kernels.linear(x[order].contiguous(), packed, bias), whole[order])
    assert kernels.is_exact


@each_compiled
@each_format
@pytest.mark.parametrize("rows", [1, 5, 13, 200])
def test_threads_do_not_change_bits(kernels: CpuKernels, rows: int, format: str) -> None:
    x, packed = normal(rows, 320, seed=1), pack(kernels, normal(1000, 320), format)
    results = []
    for num_threads in (1, 2, 3, 7):
        kernels.set_num_threads(num_threads)
        results.append(kernels.linear(x, packed))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.skipif(len(COMPILED) < 2, reason="needs two instruction sets")
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_instruction_sets_agree(shape: tuple[int, int], format: str) -> None:
    """Those without VNNI, without FMA and without half precision too."""
    weight, x, bias = normal(*shape), normal(20, shape[1], seed=1) * 100, normal(shape[0], seed=2)
    first, *others = (kernels.linear(x, pack(kernels, weight, format), bias) for kernels in COMPILED)
    assert all(same_bits(other, first) for other in others)


@each_compiled
def test_the_largest_codes_do_not_overflow(kernels: CpuKernels) -> None:
    """127 * 127 in every place, and the other sign."""
    weight = torch.ones(33, 4096)
    weight[1] = -1
    for sign in (1.0, -1.0):
        got = kernels.linear(torch.full((2, 4096), sign), pack(kernels, weight, "int8"))
        torch.testing.assert_close(got[0, :3], torch.tensor([4096.0, -4096.0, 4096.0]) * sign)


@each_set
@each_format
def test_zeros(kernels: Kernels, format: str) -> None:
    weight = normal(40, 96)
    weight[3] = 0
    x = normal(4, 96, seed=1)
    x[1] = 0
    got = kernels.linear(x, pack(kernels, weight, format))
    assert not got[1].any()
    assert format == "symmetric int4" or not got[:, 3].any()
    assert got[[0, 2, 3]].count_nonzero() > 100


@each_set
@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_shows_in_its_row_alone(kernels: Kernels, format: str, bad: float) -> None:
    weight, x = normal(40, 160), normal(12, 160, seed=1)
    packed = pack(kernels, weight, format)
    clean = kernels.linear(x, packed)
    broken = x.clone()
    broken[5, 3], broken[7, 159] = bad, bad
    got = kernels.linear(broken, packed)
    rows = torch.tensor([row not in (5, 7) for row in range(12)])
    assert same_bits(got[rows], clean[rows])
    assert got[~rows].isnan().all()


@each_set
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_broken_weight_shows_in_its_output_alone(kernels: Kernels, format: str) -> None:
    weight = normal(40, 96)
    weight[7, 50], weight[9, 3] = torch.nan, torch.inf
    got = kernels.linear(normal(3, 96, seed=1), pack(kernels, weight, format))
    outputs = torch.tensor([output not in (7, 9) for output in range(40)])
    assert got[:, outputs].isfinite().all() and got[:, ~outputs].isnan().all()


@each_set
@each_format
def test_values_of_any_size(kernels: Kernels, format: str) -> None:
    """Down to 2^-100, which counts as zero with all below; no denormal and no sum near the top is lost."""
    weight, x = normal(33, 64), normal(1, 64, seed=1)
    packed = pack(kernels, weight, format)
    for exponent in (-95, -30, 90, 115):
        scaled = kernels.linear(x * 2.0**exponent, packed)
        torch.testing.assert_close(scaled * 2.0**-exponent, kernels.linear(x, packed), atol=0, rtol=1e-5)
    assert not kernels.linear(x.clamp(-0.5, 0.5) * 2.0**-100, packed).any()
    assert not kernels.linear(torch.full((1, 64), 1e-42), packed).any()


@each_set
def test_codes_are_taken_as_they_are(kernels: Kernels) -> None:
    """Every code at every place, against the definition: code * scale + offset, or (code - 8) * scale."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (70, 96), generator=generator, dtype=torch.uint8)
    scales, offsets = normal(70, 3).half(), normal(70, 3, seed=1).half()
    per_input = [part.double().repeat_interleave(GROUP_SIZE, dim=1) for part in (scales, offsets)]
    x = torch.eye(96) * 127  # its own codes, exactly
    for kept, values in (
        (offsets, codes.double() * per_input[0] + per_input[1]),
        (None, (codes.double() - 8) * per_input[0]),
    ):
        packed = kernels.empty_packed(70, 96, torch.float32, "int4", kept is not None)
        kernels.pack_codes(packed, 0, join_codes(codes)[:64], scales[:64], None if kept is None else kept[:64])
        kernels.pack_codes(packed, 64, join_codes(codes)[64:], scales[64:], None if kept is None else kept[64:])
        torch.testing.assert_close(kernels.linear(x, packed).double(), 127 * values.T, atol=1e-3, rtol=1e-6)
    assert torch.equal(split_codes(join_codes(codes)), codes)


@pytest.mark.skipif(len(COMPILED) < 2, reason="needs two instruction sets")
def test_every_half_is_read_the_same() -> None:
    """Denormals, infinities and NaN among them: 65536 offsets, one for each output and group."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(2048, 32)
    codes, scales = torch.zeros(2048, 512, dtype=torch.uint8), torch.ones(2048, 32).half()
    x = torch.eye(32).repeat_interleave(GROUP_SIZE, dim=1)  # row g sums group g's offsets and nothing else
    results = []
    for kernels in COMPILED:
        packed = kernels.empty_packed(2048, 1024, torch.float32, "int4", True)
        kernels.pack_codes(packed, 0, codes, scales, halves)
        results.append(kernels.linear(x, packed))
    assert all(torch.equal(other.isnan(), results[0].isnan()) for other in results)
    assert all(same_bits(other.nan_to_num(7.0), results[0].nan_to_num(7.0)) for other in results)
    is_alone = halves.isfinite().all(dim=1)
    wanted = 32 * halves[is_alone].float()
    torch.testing.assert_close(results[0][:, is_alone].T, wanted, atol=0, rtol=1e-6)


@each_compiled
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_strips_equal_the_whole(kernels: CpuKernels, format: str) -> None:
    weight, x = normal(100, 96).bfloat16(), normal(3, 96, seed=1)
    packed = kernels.empty_packed(100, 96, weight.dtype, format, True)
    for first in (64, 0, 32, 96):
        kernels.pack_rows(packed, first, weight[first : first + 32])
    assert same_bits(kernels.linear(x, packed), kernels.linear(x, pack(kernels, weight, format)))


def test_rounding() -> None:
    codes, scales = round_int8(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]] and scales.tolist() == [1.0, 0.0]
    weight = normal(20, 64)
    codes, scales, offsets = round_int4(weight)
    per_input = [part.float().repeat_interleave(GROUP_SIZE, dim=1) for part in (scales, offsets)]
    error = (split_codes(codes) * per_input[0] + per_input[1] - weight).abs()
    assert bool((error <= per_input[0] * 0.51).all())
    constant = round_int4(torch.full((1, 32), 0.25))
    assert (constant[1].item(), constant[2].item(), constant[0].any().item()) == (0.0, 0.25, False)


def test_activations_in_short_groups() -> None:
    x = torch.cat((torch.full((1, INT8_SPAN), 1000.0), torch.tensor([[1.0, -0.5, 0.25]])), dim=1)
    codes, steps, sums = code_activations(x, INT8_SPAN)
    assert codes[0, -4:].tolist() == [127, 127, -64, 32]
    assert sums.tolist() == [[127.0 * INT8_SPAN, 95.0]] and steps.shape == (1, 2)


@each_set
def test_refusals(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="int4 linears have a multiple of 32 inputs; got 48"):
        kernels.empty_packed(64, 48, torch.bfloat16, "int4")
    with pytest.raises(ValueError, match=r"format must be .*; got 'int2'"):
        kernels.empty_packed(64, 64, torch.bfloat16, "int2")
    packed = kernels.empty_packed(64, 64, torch.bfloat16, "int4", True)
    codes, scales = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 2).half()
    with pytest.raises(ValueError, match="offsets are missing"):
        kernels.pack_codes(packed, 0, codes, scales, None)
    with pytest.raises(ValueError, match=r"codes must be torch.uint8 \[64, 32\]; got torch.uint8 \[64, 31\]"):
        kernels.pack_codes(packed, 0, codes[:, 1:], scales, scales)
    with pytest.raises(ValueError, match=r"offsets must be torch.float16 \[64, 2\]; got torch.float32"):
        kernels.pack_codes(packed, 0, codes, scales, scales.float())
    with pytest.raises(ValueError, match="stored codes belong into an int4 weight; got 'int8'"):
        kernels.pack_codes(kernels.empty_packed(64, 64, torch.bfloat16, "int8"), 0, codes, scales, None)
