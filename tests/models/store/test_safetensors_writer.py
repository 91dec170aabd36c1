"""What we write the library reads, whole or in shards, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.store import StoreError
from models.store.folder import INDEX, WEIGHTS
from models.store.safetensors_file import check_header
from models.store.safetensors_writer import MAX_THREADS, Entry, write_weights

VALUES = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array([[7]], np.float16)}
CODES = np.arange(64, dtype=np.uint8).reshape(16, 4)
ENTRIES = [
    *(Entry(name, "F16", values.shape, [lambda values=values: values]) for name, values in VALUES.items()),
    Entry("c", "U8", (16, 4), [lambda: CODES[:7], lambda: CODES[7:]]),
]


def test_one_file_is_hashed_on_the_way(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    hashes = write_weights(tmp_path, ENTRIES, lambda *step: steps.append(step), 78)

    path = tmp_path / WEIGHTS
    found = load_file(path)
    assert {name: found[name].numpy().tolist() for name in VALUES} == {k: v.tolist() for k, v in VALUES.items()}
    assert torch.equal(found["c"], torch.from_numpy(CODES))
    assert hashes == {WEIGHTS: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert steps == [(12, 78), (14, 78), (42, 78), (78, 78)]
    assert check_header(path) == {"a": ("F16", (2, 3)), "b": ("F16", (1, 1)), "c": ("U8", (16, 4))}


def test_large_weights_become_shards_with_an_index(tmp_path: Path) -> None:
    hashes = write_weights(tmp_path, ENTRIES, lambda done, total: None, max_shard_bytes=20)

    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(hashes) == names
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 78}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    assert set(load_file(tmp_path / names[0])) == {"a", "b"}
    assert torch.equal(load_file(tmp_path / names[1])["c"], torch.from_numpy(CODES))
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("pieces", [[], [np.zeros((2, 2), np.float16)], [np.zeros((2, 4), np.float16)]])
def test_values_that_are_not_as_many_as_promised_are_refused(tmp_path: Path, pieces: list[np.ndarray]) -> None:  # type: ignore[type-arg]
    entry = Entry("a", "F16", (2, 3), [lambda piece=piece: piece for piece in pieces])
    with pytest.raises(StoreError, match=r"tensor 'a' of F16 \[2, 3\]: -?\d+ bytes are missing"):
        write_weights(tmp_path, [entry], lambda done, total: None, 78)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="'a' comes twice"):
        write_weights(tmp_path, [ENTRIES[0], *ENTRIES], lambda done, total: None, 78)


def test_pieces_are_made_a_few_ahead_and_written_in_order(tmp_path: Path) -> None:
    made, written = 0, 0
    most = 0

    def make(number: int) -> np.ndarray[Any, Any]:
        nonlocal made, most
        time.sleep(0.002 * (number % 3))  # they do not end in order
        made += 1
        most = max(most, made - written)
        return np.full(4, number, np.uint8)

    def advance(done: int, total: int) -> None:
        nonlocal written
        written += 1

    entries = [Entry(f"t{i}", "U8", (16,), [partial(make, 4 * i + j) for j in range(4)]) for i in range(16)]
    write_weights(tmp_path, entries, advance, 10_000)
    found = load_file(tmp_path / WEIGHTS)
    assert [found[f"t{i}"].tolist() for i in range(16)] == [
        [4 * i + j for j in range(4) for _ in range(4)] for i in range(16)
    ]
    assert most <= 2 * MAX_THREADS


def test_a_piece_that_fails_ends_the_writing(tmp_path: Path) -> None:
    def fail() -> np.ndarray[Any, Any]:
        raise StoreError("these values are bad")

    entries = [*ENTRIES, Entry("bad", "U8", (16,), [fail, fail]), Entry("late", "U8", (16,), [lambda: CODES] * 50)]
    with pytest.raises(StoreError, match="these values are bad"):
        write_weights(tmp_path, entries, lambda done, total: None, 10_000)
