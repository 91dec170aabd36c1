"""The thread pool: concurrent callers, changing sizes, forks, floating point modes and a clean end."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from models.ops.cpu import CpuKernels
from tests.models.ops.world import COMPILED, name_of, same_bits

each_compiled = pytest.mark.parametrize("kernels", COMPILED, ids=name_of)

FORKING = """
import os, torch
from models.ops.cpu import CpuKernels
kernels = CpuKernels()
kernels.set_num_threads(2)
packed, x = kernels.pack(torch.ones(512, 256)), torch.ones(4, 256)
kernels.linear(x, packed)
child = os.fork()
is_right = all(bool((kernels.linear(x, packed) == 256).all()) for _ in range(200))
if child == 0:
    os._exit(0 if is_right and kernels.extension.num_threads() == 2 else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status) or not is_right)
"""


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_a_forked_child_starts_its_own_threads() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@each_compiled
def test_callers_on_several_threads_get_their_own_results(kernels: CpuKernels) -> None:
    packed = kernels.pack(torch.eye(256))
    wrong: list[int] = []

    def call(number: int) -> None:
        x = torch.full((number + 1, 256), float(number))
        for _ in range(100):
            if not torch.equal(kernels.linear(x, packed), x):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@each_compiled
def test_the_pool_grows_and_shrinks_while_in_use(kernels: CpuKernels) -> None:
    packed, x = kernels.pack(torch.ones(512, 64)), torch.ones(3, 64)
    for num_threads in (1, 4, 2, 7, 1, 3, 2):
        kernels.set_num_threads(num_threads)
        assert kernels.extension.num_threads() == num_threads
        for _ in range(20):
            assert bool((kernels.linear(x, packed) == 64).all())


@each_compiled
@pytest.mark.parametrize("num_threads", [0, -1, 257])
def test_refuses_a_senseless_number_of_threads(kernels: CpuKernels, num_threads: int) -> None:
    with pytest.raises(ValueError, match=rf"num_threads must be in 1\.\.256; got {num_threads}"):
        kernels.set_num_threads(num_threads)


@each_compiled
def test_the_callers_denormal_mode_does_not_change_bits(kernels: CpuKernels) -> None:
    packed, x = kernels.pack(torch.full((64, 8), 2.0**-100)), torch.full((1, 8), 2.0**-35)
    plain = kernels.linear(x, packed)
    assert plain.count_nonzero() == 64
    try:
        torch.set_flush_denormal(True)
        assert same_bits(kernels.linear(x, packed), plain)
    finally:
        torch.set_flush_denormal(False)


@each_compiled
def test_a_kernel_called_with_too_few_arguments_says_so(kernels: CpuKernels) -> None:
    with pytest.raises(TypeError, match="too few arguments: 1"):
        kernels.extension.linear(0)
    with pytest.raises(TypeError):
        kernels.extension.gate_mul(0, 0, "rows", 1, 0)
