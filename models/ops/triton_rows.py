"""Triton kernels that treat every row or value alone: norms, gates, activations, soft caps.

A program owns a row, or a fixed number of values of one: what it computes depends on nothing else, so a row's bits do
not depend on its batch. All arithmetic is fp32, whatever is loaded and stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPAN = 1024  # values of an elementwise program

RELU, GELU_TANH, GELU, SILU = (tl.constexpr(i) for i in range(4))  # the order of ACTIVATIONS in kernels.py


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh of fp32: an odd polynomial below 0.625 (our fit, as in cpu_math.h), exponentials above."""
    size = tl.abs(x)
    z = x * x
    p = -5.71703678e-3 * z + 2.06505786e-2
    p = p * z - 5.37434965e-2
    p = p * z + 1.33314908e-1
    p = p * z - 3.33332837e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * (p * z), tl.where(x < 0, -far, far))


@triton.jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == RELU:
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def _rms_norm(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, n: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    is_in = i < n
    values = tl.load(x + row * n + i, mask=is_in, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / n + eps)
    w = tl.load(weight + i, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + row * n + i, (values * scale * w).to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _layer_norm(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    eps: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    is_in = i < n
    values = tl.load(x + row * n + i, mask=is_in, other=0.0).to(tl.float32)
    away = tl.where(is_in, values - tl.sum(values, 0) / n, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, 0) / n + eps)
    y = away * scale * tl.load(weight + i, mask=is_in, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + i, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + row * n + i, y.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _gate_mul(gate_up: tl.tensor, out: tl.tensor, n: tl.tensor, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < n
    gate = tl.load(gate_up + row * 2 * n + i, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * n + n + i, mask=is_in, other=0.0).to(tl.float32)
    y = _activated(gate, ACTIVATION) * up
    tl.store(out + row * n + i, y.to(out.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["count"])
def _activate(x: tl.tensor, out: tl.tensor, count: tl.tensor, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < count
    values = tl.load(x + i, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + i, _activated(values, ACTIVATION).to(out.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["count"])
def _soft_cap(x: tl.tensor, count: tl.tensor, cap: tl.tensor, BLOCK: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < count
    values = tl.load(x + i, mask=is_in, other=0.0).to(tl.float32)
    tl.store(x + i, (tanh(values / cap) * cap).to(x.dtype.element_ty), mask=is_in)


def _flat(x: torch.Tensor) -> tuple[int, int, int]:
    """Rows, their width and the power of two that holds one."""
    n = x.shape[-1]
    return x.numel() // n if n else 0, n, triton.next_power_of_2(n)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """x, out: [..., n], contiguous."""
    rows, n, block = _flat(x)
    if rows:
        _rms_norm[(rows,)](x, weight, out, n, eps, BLOCK=block, num_warps=_num_warps(block))
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """x, out: [..., n], contiguous."""
    rows, n, block = _flat(x)
    if rows:
        shift = weight if bias is None else bias
        warps = _num_warps(block)
        _layer_norm[(rows,)](x, weight, shift, out, n, eps, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps)
    return out


def gate_mul(gate_up: torch.Tensor, activation: int, out: torch.Tensor) -> torch.Tensor:
    """gate_up [rows, 2n] -> out [rows, n], contiguous; activation: an index into ACTIVATIONS."""
    rows, n = out.shape
    if rows:
        _gate_mul[(rows, triton.cdiv(n, SPAN))](gate_up, out, n, ACTIVATION=activation, BLOCK=SPAN)
    return out


def activate(x: torch.Tensor, activation: int, out: torch.Tensor) -> torch.Tensor:
    """Elementwise over contiguous tensors of one shape."""
    count = x.numel()
    if count:
        _activate[(triton.cdiv(count, SPAN),)](x, out, count, ACTIVATION=activation, BLOCK=SPAN)
    return out


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """In place; x contiguous."""
    count = x.numel()
    if count:
        _soft_cap[(triton.cdiv(count, SPAN),)](x, count, cap, BLOCK=SPAN)
    return x
