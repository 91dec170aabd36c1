"""Safetensors: what we write the library reads, what is hostile we refuse."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.store import StoreError
from models.store.safetensors_file import check_header


def test_a_file_of_the_library_passes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.zeros(3, 5), "y": torch.zeros(7, dtype=torch.float16), "s": torch.tensor(1)}, path)
    assert check_header(path) == {"x": ("F32", (3, 5)), "y": ("F16", (7,)), "s": ("I64", ())}


def described(*spans: tuple[int, int], dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {
        f"t{place}": {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}
        for place, (begin, end) in enumerate(spans)
    }


HOSTILE: dict[str, tuple[Any, str]] = {
    "overlap": (described((0, 8), (4, 12)), "'t1' starts at 4, but the one before it ends at 8"),
    "gap": (described((0, 4), (8, 16)), "'t1' starts at 8"),
    "beyond": (described((0, 17)), "the tensors end at byte"),
    "short": (described((0, 15)), "the tensors end at byte"),
    "negative": (described((-8, 8)), "impossible offsets"),
    "reversed": (described((16, 0), shape=[0]), "ends at 0, before it begins at 16"),
    "overflow": (described((0, 16), shape=[1 << 61, 8]), "has 16 bytes of data"),
    "lying shape": (described((0, 16), shape=[3]), "has 16 bytes of data"),
    "float shape": (described((0, 16), shape=[16.0]), "impossible shape"),
    "bool shape": (described((0, 16), shape=[True, 16]), "impossible shape"),
    "many dimensions": (described((0, 16), shape=[1] * 9), "impossible shape"),
    "dtype": (described((0, 16), dtype="PICKLE"), "unknown dtype 'PICKLE'"),
    "dtype list": (described((0, 16), dtype=["U8"]), "unknown dtype"),
    "empty": (described((0, 0), shape=[0, 4]), r"'t0' of U8 \[0, 4\] is empty"),
    "no object": ({"t": 5}, "described by a int"),
    "no tensors": ([], "not an object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    header, message = HOSTILE[name]
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(StoreError, match=message):
        check_header(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (struct.pack("<Q", 1 << 63), "claims 9223372036854775808 bytes; at most 100000000"),
        (struct.pack("<Q", 1000) + b"{}", "it is truncated"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 20_000) + b"[" * 20_000, "not valid JSON"),
        (struct.pack("<Q", 15) + b'{"a":1, "a":{}}', "a name appears twice"),
    ],
)
def test_a_hostile_prefix_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=message):
        check_header(path)
