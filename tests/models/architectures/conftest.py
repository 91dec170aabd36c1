"""What the tests of every architecture share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from models.ops.select import select_kernels
from tests.models.paged import inference_on_one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with inference_on_one_thread():
        yield


@pytest.fixture(scope="session", params=[ReferenceKernels.name, "served"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The oracle's, and those that serve on this machine, for fp32."""
    if request.param == ReferenceKernels.name:
        return ReferenceKernels()
    return select_kernels(torch.device("cpu"), torch.float32)
