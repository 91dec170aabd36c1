"""Triton's norms, activations, rotary positions and store, on a GPU or else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models.ops.kernels import ACTIVATIONS, GATES
from models.ops.triton import TritonKernels
from tests.models.ops.world import ORACLE, int32, randn, same_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = {dtype: TritonKernels(dtype, DEVICE) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
WIDE = KERNELS[torch.float32]
# Triton's interpreter cuts fp32 off to bf16 where a GPU rounds it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WIDTHS = [1, 7, 64, 576, 1500]

each_type = pytest.mark.parametrize("dtype", list(KERNELS), ids=str)


@pytest.fixture(autouse=True)
def _quiet_infinities() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of them."""
    with np.errstate(all="ignore"):
        yield


def assert_close(got: torch.Tensor, wanted: torch.Tensor, atol: float = 1e-6) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.cpu().double(), wanted, atol=max(atol, tolerance), rtol=tolerance)


@each_type
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(dtype: torch.dtype, width: int) -> None:
    x = (randn(9, width) * 10 + 3).to(dtype)
    weight, bias = randn(width, seed=1).to(dtype), randn(width, seed=2).to(dtype)
    for name, arguments in (
        ("rms_norm", (weight, 1e-5)),
        ("layer_norm", (weight, bias, 1e-5)),
        ("layer_norm", (weight, None, 1e-5)),
    ):
        moved = [each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in arguments]
        norm = getattr(KERNELS[dtype], name)
        whole = norm(x.to(DEVICE), *moved)
        assert whole.dtype == dtype
        assert_close(whole, getattr(ORACLE, name)(x.double(), *arguments), atol=1e-5)
        for row in (0, 4, 8):
            assert same_bits(norm(x[row : row + 1].to(DEVICE), *moved)[0], whole[row])


@each_type
@pytest.mark.parametrize("width", [2, 7, 1500])
def test_gates_and_activations(dtype: torch.dtype, width: int) -> None:
    kernels = KERNELS[dtype]
    x = (randn(5, 2 * width) * 4).to(dtype)
    for activation in GATES:
        whole = kernels.gate_mul(x.to(DEVICE), activation)
        assert_close(whole, ORACLE.gate_mul(x.double(), activation), atol=1e-5)
        assert same_bits(kernels.gate_mul(x[3:4].to(DEVICE), activation)[0], whole[3])
    for activation in ACTIVATIONS:
        whole = kernels.activate(x.to(DEVICE), activation)
        assert_close(whole, ORACLE.activate(x.double(), activation))
        assert same_bits(kernels.activate(x[3:4].to(DEVICE), activation)[0], whole[3])


def test_the_edges_of_activations() -> None:
    x = torch.tensor([0.0, 1e-45, -1e-38, 200.0, -200.0, 1e30, -1e30, torch.inf, torch.nan]).to(DEVICE)
    for activation in ACTIVATIONS:
        got = WIDE.activate(x, activation).cpu()
        wanted = ORACLE.activate(x.cpu()[:7].double(), activation).nan_to_num(0.0)
        torch.testing.assert_close(got[:7].double(), wanted, atol=1e-37, rtol=1e-6)
        assert got[7] == torch.inf and got[8].isnan()


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_cap(cap: float) -> None:
    x = torch.cat((torch.linspace(-300, 300, 2001), torch.tensor([torch.inf, -torch.inf, torch.nan]))).to(DEVICE)
    wanted = torch.tanh(x.cpu().double() / cap) * cap
    alone = WIDE.soft_cap(x[700:701].clone(), cap)
    got = WIDE.soft_cap(x, cap)
    assert got is x and same_bits(alone[0], got[700])
    torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-30, rtol=1e-6, equal_nan=True)


def rotary_table(max_positions: int, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(max_positions).view(-1, 1) * 10000.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim / 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@each_type
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    "shape", [(9, 3, 64, 64), (4, 2, 24, 0), (2, 2, 80, 20), (1, 1, 6, 2), (2, 1, 256, 128)], ids=str
)
def test_rope_store(dtype: torch.dtype, shape: tuple[int, int, int, int], has_norms: bool) -> None:
    *heads, size, rotary_dim = shape
    num_heads, num_kv_heads = heads
    tokens, cos_sin = 7, rotary_table(60, rotary_dim) if rotary_dim else None
    qkv = randn(tokens, (num_heads + 2 * num_kv_heads) * size).to(dtype)
    q_norm, k_norm = (randn(size, seed=1).to(dtype), randn(size, seed=2)) if has_norms else (None, None)
    positions, slots = int32(list(range(11, 11 + tokens))), int32([16 + 5 * i for i in range(tokens)])
    (kv,) = KERNELS[dtype].allocate_kv(1, 4, 16, num_kv_heads, size, dtype)
    (oracle_kv,) = ORACLE.allocate_kv(1, 4, 16, num_kv_heads, size, torch.float64)
    table, of_q, of_k = (None if each is None else each.to(DEVICE) for each in (cos_sin, q_norm, k_norm))

    def store(these: slice) -> torch.Tensor:
        where = (positions[these].to(DEVICE), table, kv, slots[these].to(DEVICE))
        return KERNELS[dtype].rope_store(qkv[these].to(DEVICE), *where, num_heads, num_kv_heads, size, of_q, of_k, 1e-6)

    q = store(slice(None))
    where = (positions, cos_sin, oracle_kv, slots)
    wanted = ORACLE.rope_store(qkv.double(), *where, num_heads, num_kv_heads, size, q_norm, k_norm, 1e-6)
    assert q.dtype == dtype
    assert_close(q, wanted, atol=5e-6)
    assert_close(kv.key, oracle_kv.key, atol=5e-6)
    assert torch.equal(kv.value.cpu().double(), oracle_kv.value)
    key = kv.key.clone()
    assert same_bits(store(slice(5, 6))[0], q[5]) and same_bits(kv.key, key)


def test_no_rows() -> None:
    empty = torch.empty(0, 8, device=DEVICE)
    assert WIDE.gate_mul(empty, "gelu").shape == (0, 4)
    assert WIDE.activate(empty, "relu").shape == WIDE.soft_cap(empty, 30.0).shape == (0, 8)
    assert WIDE.rms_norm(empty, torch.ones(8, device=DEVICE), 1e-5).shape == (0, 8)


def test_linears_are_torchs() -> None:
    """In the type of the activations; a set that can not promise C4 does not claim to."""
    kernels = KERNELS[torch.bfloat16]
    assert not kernels.is_exact and kernels.name == "triton"
    x, weight = randn(5, 24).bfloat16(), randn(40, 24, seed=1).bfloat16()
    got = kernels.linear(x.to(DEVICE), kernels.pack(weight))
    torch.testing.assert_close(got.cpu().double(), x.double() @ weight.double().T, atol=0.05, rtol=0.02)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, gelu; got 'relu'"):
        WIDE.gate_mul(torch.ones(1, 8), "relu")
    with pytest.raises(ValueError, match="activation must be one of relu, gelu_tanh, gelu, silu; got 'swish'"):
        WIDE.activate(torch.ones(1, 8), "swish")
    with pytest.raises(ValueError, match=r"x must be contiguous; got strides \(1, 2\) of \[2, 4\]"):
        WIDE.soft_cap(torch.ones(4, 2).T, 30.0)
    with pytest.raises(ValueError, match="q_norm and k_norm come both or not at all"):
        (kv,) = WIDE.allocate_kv(1, 2, 16, 1, 8, torch.float32)
        WIDE.rope_store(torch.ones(1, 24), int32([0]), None, kv, int32([0]), 1, 1, 8, torch.ones(8))
