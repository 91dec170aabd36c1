"""Norms, activations, rotary positions and gathers: one row never sees another."""

from __future__ import annotations

import pytest
import torch

from models.ops.cpu import CpuKernels
from models.ops.kernels import Kernels
from tests.models.ops.world import COMPILED, ORACLE, SERVING, int32, name_of, same_bits

WIDTHS = [1, 2, 7, 16, 37, 64, 576, 1000]

each_set = pytest.mark.parametrize("kernels", SERVING, ids=name_of)
each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_set
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(kernels: Kernels, width: int) -> None:
    x, weight = randn(70, width) * 10, randn(width, seed=1)
    for w in (weight, weight.bfloat16()):
        whole = kernels.rms_norm(x, w, 1e-5)
        wanted = ORACLE.rms_norm(x.double(), w, 1e-5)
        torch.testing.assert_close(whole.double(), wanted, atol=1e-6, rtol=2e-6)
        for row in (0, 13, 69):
            assert same_bits(kernels.rms_norm(x[row : row + 1], w, 1e-5)[0], whole[row])


@each_set
@pytest.mark.parametrize("width", WIDTHS)
def test_gate_mul(kernels: Kernels, width: int) -> None:
    gate_up = randn(70, 2 * width) * 20
    whole = kernels.gate_mul(gate_up, "silu")
    torch.testing.assert_close(whole.double(), ORACLE.gate_mul(gate_up.double(), "silu"), atol=1e-30, rtol=1e-6)
    for row in (0, 13, 69):
        assert same_bits(kernels.gate_mul(gate_up[row : row + 1], "silu")[0], whole[row])


@each_compiled
def test_silu_at_the_edges_of_exp(kernels: CpuKernels) -> None:
    gate = torch.cat((torch.linspace(-87, 89, 4001), torch.tensor([-200.0, -1e30, 1e30, torch.inf, 0.0, torch.nan])))
    got = kernels.gate_mul(torch.stack((gate, torch.ones_like(gate))).view(1, -1), "silu").view(-1)
    wanted = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(got.double(), wanted, atol=1e-34, rtol=5e-7, equal_nan=True)


def rotary_table(max_positions: int, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(max_positions).view(-1, 1) * 10000.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim / 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@each_set
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32], ids=str)
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
    tolerance = 1e-2 if kv_dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(key, oracle_kv.key, atol=tolerance, rtol=tolerance)
    alone = kernels.rope_store(qkv[5:6], positions[5:6], cos_sin, kv, slots[5:6], num_heads, num_kv_heads, size)
    assert same_bits(alone[0], q[5])


@each_compiled
def test_values_round_to_nearest_even(kernels: CpuKernels) -> None:
    """Every kind of fp32 bit pattern rounds as torch rounds it."""
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 256), generator=torch.Generator().manual_seed(2)).int()
    bits[0, :8] = int32([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 1, 0x7FC00000])
    v = bits.view(torch.float32)
    qkv = torch.cat((torch.zeros(64, 512), v), dim=1)
    (kv,) = kernels.allocate_kv(1, 4, 16, 1, 256, torch.bfloat16)
    kernels.rope_store(qkv, torch.zeros(64, dtype=torch.int32), None, kv, torch.arange(64).int(), 1, 1, 256)
    stored, wanted = kv.value.view(64, 256), v.bfloat16()
    is_nan = wanted.isnan()
    assert torch.equal(stored.isnan(), is_nan)
    assert torch.equal(stored.masked_fill(is_nan, 0).view(torch.int16), wanted.masked_fill(is_nan, 0).view(torch.int16))


@each_compiled
@pytest.mark.parametrize("width", [1, 15, 576])
def test_gather_rows(kernels: CpuKernels, width: int) -> None:
    table, ids = randn(50, width), int32([0, 49, 7, 7])
    for t in (table, table.bfloat16()):
        assert torch.equal(kernels.gather_rows(t, ids), t[ids.long()].float())
    with pytest.raises(ValueError, match=r"token id must be in 0\.\.49; got 50 at index 1"):
        kernels.gather_rows(table, int32([0, 50]))
