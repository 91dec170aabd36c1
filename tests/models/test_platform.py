"""Device facts agree with what the system says in other ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from models.config import ModelError
from models.platform import device_facts


def test_cpu() -> None:
    facts = device_facts("cpu")
    assert facts.kind == "cpu"
    assert facts.name
    assert facts.num_cores == len(os.sched_getaffinity(0))
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < facts.free_memory_bytes <= facts.memory_bytes <= total_kib * 1024
    assert facts.isa.startswith(("avx", "amx")) == torch.backends.cpu.get_cpu_capability().startswith("AVX")


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_devices_that_cannot_serve(device: str) -> None:
    with pytest.raises(ModelError, match=f"device must be cpu or cuda; got '{device}'"):
        device_facts(device)


def test_a_device_that_is_not_there() -> None:
    index = torch.cuda.device_count()
    with pytest.raises(ModelError, match=f"device 'cuda:{index}' does not exist: {index} CUDA devices are visible"):
        device_facts(f"cuda:{index}")
