"""Whatever is wrong with a file, a pull ends well or in a StoreError; and most damage is found."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.store import StoreError
from models.store.convert import convert_gguf
from models.store.folder import INDEX, check_folder, copy_model
from tests.models.store.families import write_family, write_original
from tests.models.store.world import write_folder, write_gguf, write_vocabulary

WORDS = [
    b"\xff" * 8, bytes(8), b"\1" + bytes(7), bytes(7) + b"\x80", bytes(4) + b"\1\0\0\0", b"\0\0\x80\x7f",
    b"\0\0\xc0\x7f", b"\xff\xff\xff\x7f",
]  # fmt: skip
"""Numbers at the edges: the largest, zero, one, the smallest, 2 to the 32nd, infinity, NaN."""


@pytest.mark.parametrize("name", ["llama", "mixtral", "gptneox"])
def test_random_damage_to_a_gguf_file(tmp_path: Path, name: str) -> None:
    if name == "llama":
        whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    else:
        _, tensors = write_original(name, tmp_path / "original")
        whole = write_family(name, tmp_path / "m.gguf", tensors, kind="Q4_1").read_bytes()
    source = random.Random(11)
    outcomes = {"converted": 0, "refused": 0}
    for _ in range(50):
        data = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(4, 14_000)
            word = bytes([source.randrange(256)]) if source.random() < 0.5 else source.choice(WORDS)
            data[at : at + len(word)] = word
        (tmp_path / "damaged.gguf").write_bytes(data)
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            convert_gguf(tmp_path / "damaged.gguf", folder, lambda done, total: None, keep_int4=source.random() < 0.5)
            outcomes["converted"] += 1
        except StoreError as error:
            outcomes["refused"] += 1
            assert str(error)
    assert outcomes["refused"] > 15


VALUES = [
    b"null",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b'""',
    rb'"\ud800"',
    b"NaN",
    b"true",
    b"9" * 30,
    b'"../x"',
    rb'"\u0000"',
]


def test_random_damage_to_a_folder(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "whole")
    for name in ("tokenizer.json", "model.safetensors"):
        (whole / name).unlink()
    write_vocabulary(whole)
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for tensor, name in shards.items():
        save_file({tensor: torch.zeros(2)}, whole / name)
    (whole / INDEX).write_text(json.dumps({"weight_map": shards}))
    source = random.Random(12)
    outcomes = {"accepted": 0, "refused": 0}
    for _ in range(150):
        folder, target = tmp_path / "folder", tmp_path / "out"
        for path in (folder, target):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, folder)
        target.mkdir()
        path = source.choice(sorted(folder.iterdir()))
        data = bytearray(path.read_bytes())
        values = list(re.finditer(rb'"[^"]*"|\d+|\[[^\]]*\]', data))
        if values and source.random() < 0.5:
            value = source.choice(values)
            data[value.start() : value.end()] = source.choice(VALUES)
        else:
            data[source.randrange(len(data))] = source.randrange(256)
        path.write_bytes(data)
        try:
            check_folder(folder, is_source=True)
            copy_model(folder, target)
            check_folder(target)
            outcomes["accepted"] += 1
        except StoreError as error:
            outcomes["refused"] += 1
            assert str(error)
    assert outcomes["refused"] > 60
    assert outcomes["accepted"] > 5  # a changed special token, a merge less
