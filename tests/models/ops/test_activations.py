"""Activations and soft caps: right by tolerance at every size of value, and each value has bits of its own."""

from __future__ import annotations

import math

import pytest
import torch

from models.ops.cpu import CpuKernels
from models.ops.kernels import ACTIVATIONS, GATES, Kernels
from tests.models.ops.world import COMPILED, ORACLE, SERVING, name_of, randn, same_bits

WIDTHS = [1, 2, 7, 16, 37, 64, 576, 1000]
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 200.0, -200.0, 1e30, -1e30, 3.4e38, -3.4e38]

each_set = pytest.mark.parametrize("kernels", SERVING, ids=name_of)
each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)


def exact(x: torch.Tensor, activation: str) -> torch.Tensor:
    """In float64 without cancellation, which torch's own formulas suffer in the lower tails."""
    x = x.double()
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "gelu":
        above: torch.Tensor = torch.special.erfc(-x / math.sqrt(2))
        return x * above / 2
    z = x if activation == "silu" else math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)
    return x * torch.sigmoid(z)


@each_set
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gate_mul(kernels: Kernels, width: int, activation: str) -> None:
    gate_up = randn(70, 2 * width) * 6
    whole = kernels.gate_mul(gate_up, activation)
    wanted = ORACLE.gate_mul(gate_up.double(), activation)
    torch.testing.assert_close(whole.double(), wanted, atol=2e-5, rtol=1e-6)
    for row in range(0, 70, 3):
        assert same_bits(kernels.gate_mul(gate_up[row : row + 1], activation)[0], whole[row])


@each_set
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_activate(kernels: Kernels, width: int, activation: str) -> None:
    x = randn(70, width) * 6
    before = x.clone()
    whole = kernels.activate(x, activation)
    torch.testing.assert_close(whole.double(), ORACLE.activate(x.double(), activation), atol=1e-6, rtol=1e-6)
    assert same_bits(x, before)
    for row in range(0, 70, 3):
        assert same_bits(kernels.activate(x[row : row + 1], activation)[0], whole[row])


@each_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_relative_precision(kernels: CpuKernels, activation: str) -> None:
    """Down to the last normal values of the lower tail, where an exponent of 80 costs digits."""
    x = torch.cat((torch.linspace(-13, 13, 40001), torch.logspace(-30, 0, 999), -torch.logspace(-30, 0, 999)))
    got, wanted = kernels.activate(x, activation).double(), exact(x, activation)
    torch.testing.assert_close(got, wanted, atol=1e-35, rtol=2e-5)
    is_near = x.abs() < 3
    torch.testing.assert_close(got[is_near], wanted[is_near], atol=0, rtol=2e-6)


@each_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_edges(kernels: CpuKernels, activation: str) -> None:
    """Nothing overflows on its way; NaN stays NaN; -inf, which only a broken row holds, is not made good."""
    x = torch.tensor(EDGES)
    got = kernels.activate(x, activation)
    torch.testing.assert_close(got.double(), exact(x, activation).nan_to_num(0.0), atol=1e-37, rtol=5e-7)
    broken = kernels.activate(torch.tensor([torch.nan, torch.inf, -torch.inf]), activation)
    assert broken[0].isnan() and broken[1] == torch.inf
    assert broken[2] == 0 if activation == "relu" else broken[2].isnan()


@each_compiled
def test_silu_at_the_edges_of_exp(kernels: CpuKernels) -> None:
    gate = torch.cat((torch.linspace(-87, 89, 4001), torch.tensor([-200.0, -1e30, 1e30, torch.inf, 0.0, torch.nan])))
    got = kernels.gate_mul(torch.stack((gate, torch.ones_like(gate))).view(1, -1), "silu").view(-1)
    wanted = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(got.double(), wanted, atol=1e-34, rtol=5e-7, equal_nan=True)


@each_set
@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
def test_soft_cap(kernels: Kernels, cap: float) -> None:
    finite = torch.cat((torch.linspace(-300, 300, 20001), torch.logspace(-30, 38, 999), torch.tensor(EDGES)))
    x = torch.cat((finite, torch.tensor([torch.inf, -torch.inf, torch.nan]))).view(1, -1)
    wanted = torch.tanh(x.double() / cap) * cap
    got = kernels.soft_cap(x, cap)
    assert got is x or got.data_ptr() == x.data_ptr()
    torch.testing.assert_close(got.double(), wanted, atol=1e-43, rtol=5e-7, equal_nan=True)
    assert got[0, :-1].abs().max() <= cap


@each_set
def test_a_capped_row_has_bits_of_its_own(kernels: Kernels) -> None:
    logits = randn(33, 1000) * 40
    whole = kernels.soft_cap(logits.clone(), 30.0)
    for row in range(33):
        assert same_bits(kernels.soft_cap(logits[row : row + 1].clone(), 30.0)[0], whole[row])


@each_compiled
def test_threads_do_not_change_bits(kernels: CpuKernels) -> None:
    x = randn(9, 5000) * 6
    results = []
    for num_threads in (1, 2, 3):
        kernels.set_num_threads(num_threads)
        rows = [kernels.activate(x, activation) for activation in ACTIVATIONS]
        rows += [kernels.gate_mul(x, activation) for activation in GATES]
        results.append([*rows, kernels.soft_cap(x.clone(), 5.0), kernels.layer_norm(x, x[0], x[1], 1e-5)])
    for result in results[1:]:
        assert all(same_bits(one, other) for one, other in zip(result, results[0], strict=True))


@each_set
def test_no_rows(kernels: Kernels) -> None:
    empty = torch.empty(0, 8)
    assert kernels.gate_mul(empty, "gelu").shape == (0, 4)
    assert kernels.activate(empty, "relu").shape == kernels.soft_cap(empty, 30.0).shape == (0, 8)
    assert kernels.layer_norm(empty, torch.ones(8), None, 1e-5).shape == (0, 8)


@each_set
def test_refuses_unknown_activations(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, gelu; got 'relu'"):
        kernels.gate_mul(torch.ones(1, 8), "relu")
    with pytest.raises(ValueError, match="activation must be one of relu, gelu_tanh, gelu, silu; got 'swish'"):
        kernels.activate(torch.ones(1, 8), "swish")


@each_compiled
def test_refuses_what_it_can_not_read(kernels: CpuKernels) -> None:
    wide, turned = torch.ones(2, 8, dtype=torch.float64), torch.ones(8, 2).T
    for x in (wide, turned):
        with pytest.raises(ValueError, match="x must be contiguous float32"):
            kernels.activate(x, "gelu")
        with pytest.raises(ValueError, match="x must be contiguous float32"):
            kernels.soft_cap(x, 30.0)
        with pytest.raises(ValueError, match="x must be contiguous float32"):
            kernels.layer_norm(x, torch.ones(8), None, 1e-5)
    for cap in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"cap must be positive and finite; got {cap}"):
            kernels.soft_cap(torch.ones(1, 8), cap)
    with pytest.raises(ValueError, match=r"bias must be contiguous \[8\]; got torch.float32 \[7\]"):
        kernels.layer_norm(torch.ones(1, 8), torch.ones(8), torch.ones(7), 1e-5)
