"""What can be loaded at all, and how a folder's content is told from another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelError
from models.registry import load_model, weights_fingerprint
from models.store.manifest import write_manifest
from tests.tiny import tiny_llama


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_unknown_architectures_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    edit_config(tiny_llama(tmp_path), model_type="mamba")
    with pytest.raises(ModelError, match=r"model_type 'mamba' is not one of .*llama"):
        load_model(tmp_path)


@pytest.mark.parametrize("length", [0, 513])
def test_a_context_longer_than_the_models(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelError, match=f"max_model_len must be from 1 to the model's 512 positions; got {length}"):
        load_model(tiny_llama(tmp_path), max_model_len=length)


@pytest.mark.parametrize("dtype", ["int8", torch.float64, "torch"])
def test_unknown_types(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ModelError, match="dtype must be one of bfloat16, float16, float32; got"):
        load_model(tiny_llama(tmp_path), dtype=dtype)


@pytest.mark.parametrize("has_manifest", [False, True])
def test_fingerprint_is_the_contents(tmp_path: Path, has_manifest: bool) -> None:
    """Equal for a copy elsewhere; another for other weights of the same sizes or another config."""

    def fingerprint(folder: Path) -> str:
        if has_manifest:
            (folder / "argosy.json").unlink(missing_ok=True)
            write_manifest(folder, "a test", {})
        return weights_fingerprint(folder)

    original = tiny_llama(tmp_path / "a")
    expected = fingerprint(original)
    copy = shutil.copytree(original, tmp_path / "b")
    assert fingerprint(copy) == expected
    assert fingerprint(tiny_llama(tmp_path / "c", seed=1)) != expected
    flip_bit(copy / "model.safetensors", -1)
    assert fingerprint(copy) != expected
    flip_bit(copy / "model.safetensors", -1)
    assert fingerprint(copy) == expected
    edit_config(copy, rms_norm_eps=2e-6)
    assert fingerprint(copy) != expected


def test_fingerprint_of_files_that_are_not_the_manifests(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "a")
    write_manifest(folder, "a test", {})
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"model.safetensors has \d+ bytes; argosy.json says \d+"):
        weights_fingerprint(folder)


def test_fingerprint_of_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model.safetensors"):
        weights_fingerprint(tmp_path / "nowhere")
