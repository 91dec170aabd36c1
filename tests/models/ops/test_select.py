from __future__ import annotations

import sys

import pytest
import torch

from models.ops import select
from models.ops.cpu import CpuKernels, load_extension
from models.ops.select import select_kernels, set_num_threads
from tests.models.ops.world import COMPILED

CPU = torch.device("cpu")


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_a_cpu_gets_the_best_compiled_kernels() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kernels = select_kernels(CPU, dtype)
        assert kernels.name == COMPILED[-1].name and kernels.is_exact
        assert kernels.activation_dtype == torch.float32


def test_without_a_compiler_a_cpu_gets_the_tiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_cpu_base", "_cpu_v3", "_cpu_v4", "_cpu_v4_vnni", "_cpu_v4_bf16"):
        monkeypatch.setitem(sys.modules, f"models.ops.{name}", None)
    load_extension.cache_clear()
    try:
        assert select_kernels(CPU, torch.bfloat16).name == "tiled"
        with pytest.raises(RuntimeError, match="not compiled"):
            CpuKernels()
        set_num_threads(torch.get_num_threads())
    finally:
        load_extension.cache_clear()


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_a_variant_that_was_not_built_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_cpu_v3", "_cpu_v4", "_cpu_v4_vnni", "_cpu_v4_bf16"):
        monkeypatch.setitem(sys.modules, f"models.ops.{name}", None)
    load_extension.cache_clear()
    try:
        assert select_kernels(CPU, torch.bfloat16).name == "cpu-base"
    finally:
        load_extension.cache_clear()


def test_kinds() -> None:
    assert select_kernels(CPU, torch.bfloat16, "tiled").name == "tiled"
    reference = select_kernels(CPU, torch.bfloat16, "reference")
    assert (reference.name, reference.activation_dtype) == ("reference", torch.float32)
    assert select_kernels(CPU, torch.float64).activation_dtype == torch.float64
    meta = select_kernels(torch.device("meta"), torch.bfloat16)
    assert (meta.name, meta.activation_dtype) == ("reference", torch.bfloat16)
    assert meta.allocate_kv(1, 2, 16, 1, 8, torch.bfloat16)[0].key.device.type == "meta"
    with pytest.raises(ValueError, match="kernels must be one of auto, cpu, tiled, triton, reference; got 'fast'"):
        select_kernels(CPU, torch.bfloat16, "fast")
    with pytest.raises(ValueError, match="kernels 'cpu' are not available on device 'meta'"):
        select_kernels(torch.device("meta"), torch.bfloat16, "cpu")


def test_cuda_gets_triton_and_torch_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to choose: only to compute."""
    cuda = torch.device("cuda")
    for kind in ("auto", "triton"):
        kernels = select_kernels(cuda, torch.bfloat16, kind)
        assert (kernels.name, kernels.activation_dtype, kernels.is_exact) == ("triton", torch.bfloat16, False)
    assert select_kernels(cuda, torch.float16, "reference").name == "reference"
    with pytest.raises(ValueError, match="kernels 'triton' are not available on device 'cpu'"):
        select_kernels(CPU, torch.bfloat16, "triton")
    monkeypatch.setitem(sys.modules, "models.ops.triton", None)
    assert select_kernels(cuda, torch.bfloat16).name == "reference"
    with pytest.raises(ValueError, match="need the package triton, which is not installed"):
        select_kernels(cuda, torch.bfloat16, "triton")


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_one_call_sets_every_pool() -> None:
    set_num_threads(2)
    extension = load_extension()
    assert extension is not None and extension.num_threads() == 2 == torch.get_num_threads()
    with pytest.raises(ValueError, match="num_threads must be at least 1; got 0"):
        select.set_num_threads(0)
