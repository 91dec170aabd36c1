from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.models.ops.world import COMPILED


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Tests may set any number of threads; the next one starts with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for kernels in COMPILED:
        kernels.set_num_threads(2)
    yield
    torch.set_num_threads(before)
