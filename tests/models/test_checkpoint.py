"""A model loads whole or not at all, and the message names what is wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import Checkpoint
from models.config import ModelError
from models.registry import CausalLM, load_model
from models.weight_files import INDEX_FILE, SINGLE_FILE
from tests.models.paged import Sequences
from tests.tiny import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def load(folder: Path, **options: Any) -> CausalLM:
    return load_model(folder, dtype="float32", **options)


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace (or with None drop) tensors; __ in a keyword stands for a dot."""
    content = load_file(folder / SINGLE_FILE)
    for keyword, tensor in tensors.items():
        name = keyword.replace("__", ".")
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    save_file(content, folder / SINGLE_FILE)


def split(folder: Path) -> dict[str, str]:
    """Turn the single file into two with an index, as large models come; returns the index's map."""
    content = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(sorted(content))}
    for file in set(weight_map.values()):
        save_file({name: content[name] for name in content if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits(model: CausalLM) -> torch.Tensor:
    sequences = Sequences(model, [torch.arange(30)], torch.float32)
    sequences.step([(0, 30)])
    return sequences.all_logits(0)


def test_files_with_an_index_are_the_same_model(folder: Path) -> None:
    whole = logits(load(folder))
    split(folder)
    assert torch.equal(logits(load(folder)), whole)


def test_counts(folder: Path) -> None:
    model = load(folder)
    tensors = load_file(folder / SINGLE_FILE)
    assert model.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    read_per_step = sum(t.numel() for name, t in tensors.items() if "embed_tokens" not in name)
    assert model.weight_bytes == 4 * read_per_step


def test_a_tied_model_reads_its_embedding_as_head(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tie_word_embeddings=True)
    model = load(folder)
    assert model.num_parameters == sum(tensor.numel() for tensor in load_file(folder / SINGLE_FILE).values())
    assert model.weight_bytes == 4 * model.num_parameters
    expected = logits(model)
    table = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=table)  # some exports store the copy, too
    assert torch.equal(logits(load(folder)), expected)
    rewrite(folder, lm_head__weight=2 * table)  # and one that says otherwise is taken at its word
    assert torch.equal(logits(load(folder)), 2 * expected)


def test_old_exports_hold_a_rotary_buffer(folder: Path) -> None:
    expected = logits(load(folder))
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(12))
    assert torch.equal(logits(load(folder)), expected)


def test_buffers_of_any_type_are_passed_over(folder: Path) -> None:
    """Attention masks and positions, which some exports hold as integers or truth values."""
    expected = logits(load(folder))
    prefix = "model__layers__0__self_attn__rotary_emb__"
    masks = {
        "mask": torch.ones(3, 5, dtype=torch.bool),
        "positions": torch.arange(7),
        "codes": torch.ones(9).to(torch.uint8),
    }
    rewrite(folder, **{prefix + name: tensor for name, tensor in masks.items()})
    assert torch.equal(logits(load(folder)), expected)


def test_what_is_missing_is_named_before_anything_is_read(folder: Path) -> None:
    rewrite(folder, model__norm__weight=None)  # the last tensor but one
    seen: list[int] = []
    with pytest.raises(ModelError, match=r"model.norm.weight is missing"):
        load(folder, progress=lambda done, total: seen.append(done))
    assert not seen


def test_progress_rises_to_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}  # known before the first byte is read
    assert done[-1] == sum(tensor.nbytes for tensor in load_file(folder / SINGLE_FILE).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, range(10, 30), range(79, 80), range(0)])
@pytest.mark.parametrize("columns", [None, range(48, 97), range(1)])
def test_a_rank_keeps_its_rectangle_only(
    folder: Path, dtype: torch.dtype, rows: range | None, columns: range | None
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    expected = load_file(folder / SINGLE_FILE)[name]
    expected = expected if rows is None else expected[rows.start : rows.stop]
    expected = expected if columns is None else expected[:, columns.start : columns.stop]
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    with Checkpoint(folder) as checkpoint:
        checkpoint.read_into(out, name, (80, 97), rows, columns)
    assert torch.equal(out, expected.to(dtype))


def test_large_tensors_are_converted_in_chunks(tmp_path: Path) -> None:
    whole = torch.randn(70_001, 130)
    save_file({"small": torch.ones(3), "large": whole}, tmp_path / SINGLE_FILE)
    out = torch.empty(70_001, 130, dtype=torch.bfloat16)
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.read_into(out, "large", (70_001, 130))
    assert torch.equal(out, whole.bfloat16())


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        os.truncate(folder / SINGLE_FILE, 20_000)
        with pytest.raises(ModelError, match=r"lm_head.weight is cut off: model.safetensors ends before"):
            checkpoint.read_into(torch.empty(131, 80), "lm_head.weight", (131, 80))
            checkpoint.read_into(torch.empty(131, 80), "model.embed_tokens.weight", (131, 80))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__layers__2__mlp__up_proj__weight": None}, "model.layers.2.mlp.up_proj.weight is missing"),
        ({"model__norm__weight": None}, "model.norm.weight is missing"),
        ({"lm_head__weight": None}, "lm_head.weight is missing"),
        ({"model__extra": torch.ones(2)}, "model.extra belongs to no part"),
        ({"model__layers__3__mlp__up_proj__weight": torch.ones(2)}, "model.layers.3.mlp.up_proj.weight belongs"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.ones(120)}, "q_proj.bias belongs to no part"),
        (
            {"model__layers__0__self_attn__k_proj__weight": torch.ones(48, 80)},
            r"k_proj.weight must have shape \[24, 80\]; got \[48, 80\]",
        ),
        ({"model__norm__weight": torch.ones(80, 1)}, r"model.norm.weight must have shape \[80\]; got \[80, 1\]"),
        ({"model__norm__weight": torch.ones(80, dtype=torch.int32)}, "model.norm.weight has type I32; expected one of"),
        ({"model__norm__weight": torch.ones(80, dtype=torch.int8)}, "model.norm.weight has type I8; expected one of"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: dict[str, torch.Tensor | None], words: str) -> None:
    rewrite(folder, **change)
    with pytest.raises(ModelError, match=words):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_truncated_files(folder: Path, kept: int) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated or not a safetensors file"):
        load(folder)


def test_a_header_that_claims_too_much(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelError, match=r"model.safetensors is truncated or not a safetensors file"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / SINGLE_FILE).rename(folder / name)
    with pytest.raises(ModelError, match=f"{name} is a pickle"):
        load(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(ModelError, match=r"neither model.safetensors nor model.safetensors.index.json exists"):
        load(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", "", 7])
def test_an_index_may_name_safetensors_of_its_folder_only(folder: Path, file: Any) -> None:
    write_index(folder, {**split(folder), "model.norm.weight": file})
    with pytest.raises(ModelError, match=r"model.norm.weight must be in a .safetensors file of this folder; got"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": null}'])
def test_broken_indexes(folder: Path, content: str) -> None:
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json holds no weight_map"):
        load(folder)


def test_an_index_and_its_files_must_agree(folder: Path) -> None:
    weight_map = split(folder)
    first, second = sorted(set(weight_map.values()))
    write_index(folder, {**weight_map, "model.ghost": first})
    with pytest.raises(ModelError, match=f"{first} lacks the tensor model.ghost"):
        load(folder)
    write_index(folder, weight_map)
    content = load_file(folder / second)
    save_file({**content, "model.norm.weight": torch.ones(80), "lm_head.weight": torch.ones(1)}, folder / second)
    with pytest.raises(ModelError, match=r"is in .* and in another file"):
        load(folder)
    (folder / second).unlink()
    with pytest.raises(ModelError, match=f"{second} is missing"):
        load(folder)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_values_that_float16_cannot_hold_are_named(folder: Path, quantization: str) -> None:
    content = load_file(folder / SINGLE_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    content[name][3, 5] = 1e5
    save_file({key: value.bfloat16() for key, value in content.items()}, folder / SINGLE_FILE)
    with pytest.raises(ModelError, match=f"{name} has values beyond float16's 65,504"):
        load_model(folder, dtype="float16", quantization=quantization)
    load_model(folder, dtype="bfloat16", quantization=quantization)
