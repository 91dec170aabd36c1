"""Norms, rotary positions and gathers: one row never sees another."""

from __future__ import annotations

import pytest
import torch

from models.ops.cpu import CpuKernels
from models.ops.kernels import Kernels
from tests.models.ops.world import COMPILED, ORACLE, SERVING, int32, name_of, randn, same_bits

WIDTHS = [1, 2, 7, 16, 37, 64, 576, 1000]

each_set = pytest.mark.parametrize("kernels", SERVING, ids=name_of)
each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)


@each_set
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(kernels: Kernels, width: int) -> None:
    x, weight = randn(70, width) * 10, randn(width, seed=1)
    for w in (weight, weight.bfloat16(), weight.half()):
        whole = kernels.rms_norm(x, w, 1e-5)
        wanted = ORACLE.rms_norm(x.double(), w, 1e-5)
        torch.testing.assert_close(whole.double(), wanted, atol=1e-6, rtol=2e-6)
        for row in (0, 13, 69):
            assert same_bits(kernels.rms_norm(x[row : row + 1], w, 1e-5)[0], whole[row])


@each_set
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(kernels: Kernels, width: int) -> None:
    x, weight, bias = randn(70, width) * 10 + 30, randn(width, seed=1), randn(width, seed=2)
    for w, b in ((weight, bias), (weight.bfloat16(), bias), (weight.half(), bias.half()), (weight, None)):
        whole = kernels.layer_norm(x, w, b, 1e-5)
        wanted = ORACLE.layer_norm(x.double(), w, b, 1e-5)
        # A mean of 30 is known to some 2e-6, and a width of 1 or 2 may have no spread that would hide it.
        torch.testing.assert_close(whole.double(), wanted, atol=2e-3 if width < 3 else 2e-5, rtol=2e-6)
        for row in (0, 13, 69):
            assert same_bits(kernels.layer_norm(x[row : row + 1], w, b, 1e-5)[0], whole[row])


@each_set
def test_a_layer_norm_of_equal_values_is_its_bias(kernels: Kernels) -> None:
    """Variance 0 is rescued by eps; the mean of equal values is that value, for powers of two at any width."""
    for width in WIDTHS:
        bias = randn(width, seed=2)
        out = kernels.layer_norm(torch.full((3, width), 4096.0), torch.ones(width), bias, 1e-5)
        torch.testing.assert_close(out, bias.expand(3, -1), atol=0, rtol=0)


@each_compiled
def test_norms_keep_a_broken_row_to_itself(kernels: CpuKernels) -> None:
    x, weight = randn(9, 37), randn(37, seed=1)
    x[3, 36], x[5, 0] = torch.nan, torch.inf
    for out in (kernels.rms_norm(x, weight, 1e-5), kernels.layer_norm(x, weight, None, 1e-5)):
        assert out.isfinite().all(dim=1).tolist() == [row not in (3, 5) for row in range(9)]


def rotary_table(max_positions: int, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(max_positions).view(-1, 1) * 10000.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim / 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@each_set
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(9, 3, 64, 64), (4, 2, 24, 24), (2, 2, 80, 20), (1, 1, 6, 2), (2, 1, 256, 256)], ids=str
)
def test_rope_store(kernels: Kernels, shape: tuple[int, int, int, int], kv_dtype: torch.dtype) -> None:
    """Queries by tolerance; what is stored is read back by attending to a single key, whose value is the output."""
    num_heads, num_kv_heads, size, rotary_dim = shape
    tokens, cos_sin = 37, rotary_table(60, rotary_dim)
    qkv = randn(tokens, (num_heads + 2 * num_kv_heads) * size)
    positions, slots = int32(list(range(11, 11 + tokens))), int32([16 + 2 * i for i in range(tokens)])
    (kv,) = kernels.allocate_kv(1, 6, 16, num_kv_heads, size, kv_dtype)
    (oracle_kv,) = ORACLE.allocate_kv(1, 6, 16, num_kv_heads, size, kv_dtype)
    q = kernels.rope_store(qkv, positions, cos_sin, kv, slots, num_heads, num_kv_heads, size)
    wanted = ORACLE.rope_store(qkv.double(), positions, cos_sin, oracle_kv, slots, num_heads, num_kv_heads, size)
    torch.testing.assert_close(q.double(), wanted, atol=2e-6, rtol=1e-6)
    key, value = kv.key, kv.value
    if isinstance(kernels, CpuKernels):
        key, value = key.permute(0, 3, 1, 2), value.permute(0, 2, 1, 3)
    assert torch.equal(value, oracle_kv.value)  # both round to nearest, ties to even
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}[kv_dtype]
    torch.testing.assert_close(key, oracle_kv.key, atol=tolerance, rtol=tolerance)
    alone = kernels.rope_store(qkv[5:6], positions[5:6], cos_sin, kv, slots[5:6], num_heads, num_kv_heads, size)
    assert same_bits(alone[0], q[5])


@each_set
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (4, 2, 24, 0), (2, 2, 80, 20), (2, 1, 256, 128)], ids=str)
def test_heads_are_normalised_before_they_rotate(kernels: Kernels, shape: tuple[int, int, int, int]) -> None:
    """Keys and queries with weights of their own; values as they are; a token's bits are its own."""
    num_heads, num_kv_heads, size, rotary_dim = shape
    cos_sin = rotary_table(40, rotary_dim) if rotary_dim else None
    qkv = randn(37, (num_heads + 2 * num_kv_heads) * size) * 5
    heads = (num_heads, num_kv_heads, size)
    positions, slots = int32(list(range(37))), int32(list(range(16, 53)))
    for q_norm, k_norm in (
        (randn(size, seed=1), randn(size, seed=2)),
        (randn(size).bfloat16(), randn(size, seed=3).half()),
    ):
        norms = (q_norm, k_norm, 1e-6)
        (kv,) = kernels.allocate_kv(1, 4, 16, num_kv_heads, size, torch.float32)
        (oracle_kv,) = ORACLE.allocate_kv(1, 4, 16, num_kv_heads, size, torch.float64)
        q = kernels.rope_store(qkv, positions, cos_sin, kv, slots, *heads, *norms)
        wanted = ORACLE.rope_store(qkv.double(), positions, cos_sin, oracle_kv, slots, *heads, *norms)
        torch.testing.assert_close(q.double(), wanted, atol=3e-6, rtol=2e-6)
        key, value = kv.key, kv.value
        if isinstance(kernels, CpuKernels):
            key, value = key.permute(0, 3, 1, 2), value.permute(0, 2, 1, 3)
        torch.testing.assert_close(key.double(), oracle_kv.key, atol=3e-6, rtol=2e-6)
        assert torch.equal(value.double(), oracle_kv.value)
        (other,) = kernels.allocate_kv(1, 4, 16, num_kv_heads, size, torch.float32)
        for token in (0, 5, 36):
            one = slice(token, token + 1)
            alone = kernels.rope_store(qkv[one], positions[one], cos_sin, other, slots[one], *heads, *norms)
            assert same_bits(alone[0], q[token])
            place = int(slots[token])
            block = (
                (place // 16, slice(None), slice(None), place % 16)
                if isinstance(kernels, CpuKernels)
                else (place // 16, place % 16)
            )
            assert same_bits(other.key[block], kv.key[block])


@each_compiled
def test_refuses_half_a_pair_of_head_norms(kernels: CpuKernels) -> None:
    (kv,) = kernels.allocate_kv(1, 2, 16, 1, 8, torch.bfloat16)
    plan = (torch.ones(1, 24), int32([0]), None, kv, int32([0]), 1, 1, 8)
    with pytest.raises(ValueError, match="q_norm and k_norm come both or not at all"):
        kernels.rope_store(*plan, torch.ones(8), None, 1e-6)
    with pytest.raises(ValueError, match=r"k_norm must be contiguous \[8\]; got torch.float32 \[4\]"):
        kernels.rope_store(*plan, torch.ones(8), torch.ones(4), 1e-6)


@each_compiled
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_and_values_round_to_nearest_even(kernels: CpuKernels, kv_dtype: torch.dtype) -> None:
    """As torch rounds: any bits, every tie between two numbers of the type and what lies next to it, denormals too."""
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 256), generator=torch.Generator().manual_seed(2)).int()
    bits[0, :8] = int32([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 1, 0x7FC00000])
    bits[0, 8:13] = int32([0x477FE000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001])  # the ends of fp16
    every = torch.arange(0x7C01 if kv_dtype is torch.float16 else 0x7F81).short().view(kv_dtype).double()
    ties = ((every[:-1] + every[1:]) / 2).float()[:-1]
    ties = torch.nn.functional.pad(ties, (0, -len(ties) % 256))
    nearby = [ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-1.0))]
    v = torch.cat((bits.view(torch.float32).flatten(), *nearby, *(-each for each in nearby))).view(-1, 256)
    tokens = len(v)
    (kv,) = kernels.allocate_kv(1, 64, 16, 1, 256, kv_dtype)
    slots, nowhere = torch.arange(tokens).int(), torch.zeros(tokens, dtype=torch.int32)
    kernels.rope_store(torch.cat((v, v, v), dim=1), nowhere, None, kv, slots, 1, 1, 256)
    wanted = v.to(kv_dtype)
    is_nan = wanted.isnan()
    for cached in (kv.value.view(-1, 256), kv.key.permute(0, 3, 1, 2).reshape(-1, 256)):
        stored = cached[:tokens]
        assert torch.equal(stored.isnan(), is_nan)
        same = [each.masked_fill(is_nan, 0).view(torch.int16) for each in (stored, wanted)]
        assert torch.equal(*same)


@each_compiled
@pytest.mark.parametrize("width", [1, 15, 576])
def test_gather_rows(kernels: CpuKernels, width: int) -> None:
    table, ids = randn(50, width), int32([0, 49, 7, 7])
    for t in (table, table.bfloat16(), table.half()):
        assert torch.equal(kernels.gather_rows(t, ids), t[ids.long()].float())
    with pytest.raises(ValueError, match=r"token id must be in 0\.\.49; got 50 at index 1"):
        kernels.gather_rows(table, int32([0, 50]))
