"""Triton's kernels compile for GPUs that are not here: its compiler and ptxas need none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMPILING = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

torch.set_num_threads(1)


class Absent:
    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # caches are kept per device

    def get_current_stream(self, device=None):
        return 0


run, found = JITFunction.run, []


def compile_only(kernel, *arguments, grid, warmup, **options):
    compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
    target = triton.runtime.driver.active.get_current_target()
    found.append((kernel.__name__, target.arch, "mma" in compiled.asm["ptx"]))


JITFunction.run = compile_only

from models.ops.triton import TritonKernels
from models.ops.triton_sampling import sample
from tests.models.ops.world import Contexts, Heads, int32

dtype, heads = torch.bfloat16, Heads(32, 8, 64)
for capability in (80, 90):
    triton.runtime.driver.set_active(Absent(capability))
    kernels = TritonKernels(dtype)
    contexts = Contexts(kernels, [300], heads, dtype)
    contexts.attend([(0, 299, 1)])
    contexts.attend([(0, 297, 2)])
    kernels.max_part_bytes = 0
    contexts.attend([(0, 299, 1)], window=70, softcap=30.0)
    x, weight = torch.zeros(3, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    where = (int32([0]), torch.ones(9, 32), contexts.kv, int32([0]))
    kernels.rope_store(torch.zeros(1, 48 * 64, dtype=dtype), *where, 32, 8, 64, weight, weight, 1e-5)
    kernels.rms_norm(x, weight, 1e-5), kernels.layer_norm(x, weight, weight, 1e-5), kernels.soft_cap(x, 30.0)
    for activation in ("silu", "gelu", "gelu_tanh"):
        kernels.gate_mul(x, activation)
    kernels.activate(x, "relu")
    zeros = torch.zeros(6, 4, dtype=torch.int32)
    sample(torch.zeros(4, 9000), zeros, 8999, zeros[0], zeros[1])
print(json.dumps(found))
"""

KERNELS = (
    *("_attend", "_decode", "fold", "_rope_store", "_rms_norm", "_layer_norm", "_gate_mul", "_activate", "_soft_cap"),
    *("_floors", "_best_of_chunk", "_best_of_row"),
)


def test_every_kernel_compiles(tmp_path: Path) -> None:
    """For Ampere and Hopper, and the products of attention go to the tensor cores."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    found = [tuple(each) for each in json.loads(done.stdout)]
    assert {(name, capability) for name, capability, _ in found} == {(n, c) for n in KERNELS for c in (80, 90)}
    assert all(has_products for name, _, has_products in found if name in ("_attend", "_decode"))
