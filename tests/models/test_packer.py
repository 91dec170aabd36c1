"""Weights packed strip by strip are the weights packed whole."""

from __future__ import annotations

import threading

import pytest
import torch

from models.config import ModelError
from models.ops.kernels import PackedLinear
from models.ops.reference import ReferenceKernels
from models.ops.select import select_kernels
from models.quant import packer as packer_module
from models.quant.method import WeightPart, read_part, stacked_shape
from models.quant.packer import Packer
from models.random_weights import RandomWeights

WIDTH = 50


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows of the type and width below: every weight takes several."""
    monkeypatch.setattr(packer_module, "STRIP_BYTES", 64 * WIDTH * 4)


PARTS = {
    "one": [WeightPart("q", (200, WIDTH))],
    "stacked within panels": [WeightPart("q", (70, WIDTH)), WeightPart("k", (5, WIDTH)), WeightPart("v", (133, WIDTH))],
    "rows of a rank": [
        WeightPart("gate", (300, WIDTH), range(100, 197)),
        WeightPart("up", (300, WIDTH), range(100, 197)),
    ],
    "columns of a rank": [WeightPart("down", (190, 120), columns=range(60, 60 + WIDTH))],
    "transposed": [WeightPart("c_fc", (200, WIDTH), range(30, 170), is_transposed=True)],
    "both": [WeightPart("c_attn", (200, 90), range(7, 140), range(11, 11 + WIDTH), is_transposed=True)],
    "a rank without rows": [WeightPart("lm_head", (9, WIDTH), range(9, 9))],
}


@pytest.mark.parametrize("kind", ["auto", "reference"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_strips_are_the_whole(parts: list[WeightPart], kind: str) -> None:
    kernels = select_kernels(torch.device("cpu"), torch.float32, kind)
    reader = RandomWeights()
    whole = []
    for part in parts:
        whole.append(torch.empty(part.part_shape))
        read_part(reader, part, whole[-1])
    expected = kernels.pack(torch.cat(whole))

    packed = kernels.empty_packed(*stacked_shape(parts), torch.float32)
    packed.data.fill_(torch.nan)  # what is not written shows
    with Packer(kernels, torch.float32) as packer:
        packer.pack(reader, parts, packed)
    assert torch.equal(packed.data, expected.data)
    assert reader.num_parameters == sum(part.shape[0] * part.shape[1] for part in parts)


def test_reading_goes_on_while_a_strip_is_packed() -> None:
    """Packing the first strip waits until the second has been read: one after the other would wait for ever."""
    second_is_read = threading.Event()

    class Slow(ReferenceKernels):
        def pack_rows(self, packed: PackedLinear, first_row: int, rows: torch.Tensor) -> None:
            assert second_is_read.wait(30), "nothing was read meanwhile"
            super().pack_rows(packed, first_row, rows)

    class Reader(RandomWeights):
        def read_into(
            self,
            out: torch.Tensor,
            name: str,
            shape: tuple[int, ...],
            rows: range | None = None,
            columns: range | None = None,
        ) -> None:
            super().read_into(out, name, shape, rows, columns)
            if rows is not None and rows.start > 0:
                second_is_read.set()

    kernels = Slow()
    with Packer(kernels, torch.float32) as packer:
        packer.pack(Reader(), PARTS["one"], kernels.empty_packed(200, WIDTH, torch.float32))


def test_a_failure_while_packing_is_the_loads() -> None:
    class Full(ReferenceKernels):
        def pack_rows(self, packed: PackedLinear, first_row: int, rows: torch.Tensor) -> None:
            raise MemoryError("no room")

    kernels = Full()
    before = threading.active_count()
    with pytest.raises(MemoryError, match="no room"), Packer(kernels, torch.float32) as packer:
        for _ in range(10):  # more strips than there is memory for: the thread gives it back even so
            packer.pack(RandomWeights(), PARTS["one"], kernels.empty_packed(200, WIDTH, torch.float32))
    assert threading.active_count() == before


def test_a_failure_while_reading_ends_the_thread() -> None:
    kernels = ReferenceKernels()
    reader = RandomWeights()
    reader.claim("q.weight", (3, 4))
    before = threading.active_count()
    with pytest.raises(ModelError, match=r"q.weight has shape \[3, 4\]"), Packer(kernels, torch.float32) as packer:
        packer.pack(reader, PARTS["one"], kernels.empty_packed(200, WIDTH, torch.float32))
    assert threading.active_count() == before
