"""Hostile and broken GGUF files end in a StoreError, before memory is spent."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from models.store import StoreError
from models.store.gguf_file import read_gguf
from tests.models.store.world import write_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(num_tensors: int = 0, num_pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "not a GGUF": (b"PK\x03\x04 a zip", "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "version": (header(version=99), "version 99"),
    "tensors": (header(num_tensors=2**63), "9223372036854775808 tensors"),
    "pairs": (header(num_pairs=2**40), "metadata pairs"),
    "key length": (header(num_pairs=1) + struct.pack("<Q", 2**62), "a string of 4611686018427387904 bytes"),
    "value length": (header(num_pairs=1) + text("k") + struct.pack("<IQ", 8, 2**40), "a string of 1099511627776"),
    "array length": (header(num_pairs=1) + text("k") + struct.pack("<IIQ", 9, 4, 2**50), "has 1125899906842624 items"),
    "array of strings": (header(num_pairs=1) + text("k") + struct.pack("<IIQ", 9, 8, 4 << 20), "is truncated"),
    "nested array": (header(num_pairs=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "unsupported type number 9"),
    "unknown type": (header(num_pairs=1) + text("k") + struct.pack("<I", 77), "unknown type number 77"),
    "not UTF-8": (header(num_pairs=1) + struct.pack("<Q", 2) + b"\xff\xfe", "not UTF-8"),
    "twice": (header(num_pairs=2) + 2 * (text("k") + struct.pack("<II", 4, 1)), "'k' appears twice"),
    "alignment": (header(num_pairs=1) + text("general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0"),
    "dimensions": (header(1) + tensor("t", (1, 1, 1, 1, 1)), "has 5 dimensions"),
    "format": (header(1) + tensor("t", (32,), kind=4242), "quantised as format number 4242"),
    "other format": (header(1) + tensor("t", (256,), kind=10), "quantised as Q2_K, which is not supported"),
    "partial block": (header(1) + tensor("t", (31,), kind=8), "not whole blocks of 32"),
    "zero": (header(1) + tensor("t", (0,)), "not whole blocks"),
    "huge": (header(1) + tensor("t", (2**40, 2**40)), "it is truncated"),
    "far": (header(1) + tensor("t", (8,), offset=2**62), "it is truncated"),
    "unaligned": (header(1) + tensor("t", (8,), offset=3) + bytes(99), "starts at 3, not a multiple of 32"),
    "overlap": (header(2) + tensor("t", (16,)) + tensor("u", (8,), offset=32) + bytes(99), "overlaps"),
    "same name": (header(2) + tensor("t", (8,)) + tensor("t", (8,), offset=32) + bytes(99), "'t' appears twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match=message):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    random.seed(1)
    last = len(whole) - 32  # the file may end in padding that nobody needs
    for size in [*range(64), *random.sample(range(last), 60), last]:
        cut.write_bytes(whole[:size])
        with pytest.raises(StoreError):
            read_gguf(cut)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    random.seed(2)
    num_refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(4, 9000)] = random.randrange(256)
        damaged.write_bytes(data)
        try:
            read_gguf(damaged)
        except StoreError:
            num_refused += 1
    assert num_refused > 20
