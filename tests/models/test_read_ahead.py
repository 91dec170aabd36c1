"""What is announced to the system is what is read next, and not much more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import read_ahead
from models.checkpoint import Checkpoint
from models.weight_files import SINGLE_FILE

if not hasattr(os, "posix_fadvise"):
    pytest.skip("this system takes no advice", allow_module_level=True)

SHAPE = (1000, 512)
ROW = 512 * 4


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) that the system was told to fetch."""
    seen: list[tuple[int, int]] = []

    def fadvise(file: int, offset: int, num_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            seen.append((offset, num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(SHAPE), "b": torch.zeros(SHAPE)}, tmp_path / SINGLE_FILE)
    return tmp_path


def read(checkpoint: Checkpoint, name: str, device: str, rows: range, columns: range | None = None) -> None:
    out = torch.empty(len(rows), len(columns or range(512)), device=device)
    checkpoint.read_into(out, name, SHAPE, rows, columns)


def test_the_second_tensor_is_announced_while_the_first_is_read(
    folder: Path, announced: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "DISTANCE_BYTES", 300 * ROW)
    monkeypatch.setattr(read_ahead, "_PIECE_BYTES", 100 * ROW)
    begin_of_b = (folder / SINGLE_FILE).stat().st_size - 1000 * ROW
    begin_of_a = begin_of_b - 1000 * ROW
    with Checkpoint(folder) as checkpoint:
        read(checkpoint, "b", "meta", range(200, 600))  # the order of reading, not of the file
        read(checkpoint, "a", "meta", range(1000))
        assert not announced
        checkpoint.rewind()
        assert announced == [(begin_of_b + row * ROW, 100 * ROW) for row in (200, 300, 400)]
        announced.clear()
        read(checkpoint, "b", "cpu", range(200, 500))
        assert announced == [
            (begin_of_b + 500 * ROW, 100 * ROW),
            (begin_of_a, 100 * ROW),
            (begin_of_a + 100 * ROW, 100 * ROW),
        ]
        read(checkpoint, "b", "cpu", range(500, 600))
        read(checkpoint, "a", "cpu", range(1000))
        assert sum(num_bytes for _, num_bytes in announced) == 1100 * ROW


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(range(100, 400), [(100 * 4, 10 * ROW)]), (range(100, 200), [(row * ROW + 400, 400) for row in range(10)])],
    ids=["most of a row: all of it", "less than half: itself"],
)
def test_columns(
    folder: Path, announced: list[tuple[int, int]], columns: range, expected: list[tuple[int, int]]
) -> None:
    begin_of_a = (folder / SINGLE_FILE).stat().st_size - 2000 * ROW
    with Checkpoint(folder) as checkpoint:
        read(checkpoint, "a", "meta", range(10), columns)
        checkpoint.rewind()
    assert announced == [(begin_of_a + offset, num_bytes) for offset, num_bytes in expected]
