"""The preflight finds nothing on a sound device, and what is broken on a broken one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from models import preflight

LITTLE = 1e-9  # of the memory: one piece


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(preflight, "SIZE", 64)
    monkeypatch.setattr(preflight, "NUM_PRODUCTS", 2)


def test_a_sound_device_has_no_faults() -> None:
    assert preflight.faults(["cpu", "cpu"], share=LITTLE) == []


def test_memory_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = torch.Tensor.fill_

    def forgetful(tensor: torch.Tensor, value: int) -> torch.Tensor:
        fill(tensor, value)
        tensor[7] ^= 1
        return tensor

    monkeypatch.setattr(torch.Tensor, "fill_", forgetful)
    assert preflight.faults(["cpu"], share=LITTLE) == ["cpu: 1 words of memory do not hold what was written"]


def test_arithmetic_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    product, calls = torch.Tensor.__matmul__, []

    def erring(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        calls.append(left.dtype)
        result = product(left, right)
        if len(calls) == 3:  # the first is what is expected
            result[5, 5] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", erring)
    assert preflight.faults(["cpu"], share=LITTLE) == ["cpu: 1 elements of a torch.float32 product are wrong"]


def test_a_device_that_is_not_there_is_a_fault() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    [fault] = preflight.faults(["cuda:0"], share=LITTLE)
    assert fault.startswith("cuda:0: ")


def test_without_a_device_nothing_is_said_to_be_well() -> None:
    ran = subprocess.run([sys.executable, "-m", "models.preflight"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "usage" in ran.stderr
