"""Which folders the engine may load, and why others not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.store import StoreError
from models.store.folder import INDEX, check_folder
from tests.models.store.world import write_folder


def shard(folder: Path, weight_map: dict[str, object]) -> Path:
    """Turn the folder into a sharded one: `a` in the first file, `b` in the second, indexed as given."""
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "model-2.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_whole_and_sharded_folders_pass(tmp_path: Path) -> None:
    check_folder(write_folder(tmp_path / "whole"))
    check_folder(shard(write_folder(tmp_path / "sharded"), {"a": "model-1.safetensors", "b": "model-2.safetensors"}))


def test_files_that_nobody_loads_do_no_harm(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / "README.md").write_text("hello")
    check_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt", "model.pth"])
def test_weights_in_a_pickle_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(StoreError, match=f"'{name}', a pickle"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / name).write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(StoreError, match=f"{name} asks for code of its own"):
        check_folder(folder)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / missing).unlink()
    with pytest.raises(StoreError, match=missing):
        check_folder(folder)


@pytest.mark.parametrize("config", ["[]", "{", "5", '{"model_type": 3}', '{"model_type": "../x"}', "[" * 50_000])
def test_a_config_that_is_none_is_refused(tmp_path: Path, config: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_text(config)
    with pytest.raises(StoreError, match=r"config\.json"):
        check_folder(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"model\.safetensors is a link out of the folder"):
        check_folder(folder)


def test_a_link_within_the_folder_and_a_hub_caches_snapshot_pass(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    check_folder(folder)

    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = write_folder(tmp_path / "models--o--n" / "snapshots" / "0123abc")
    (snapshot / "model.safetensors").rename(blobs / "cafe")
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    check_folder(snapshot)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no 'weight_map'"),
        ({"a": "../../etc/model.safetensors"}, "not a safetensors file beside it"),
        ({"a": "/etc/passwd"}, "not a safetensors file beside it"),
        ({"a": "pytorch_model.bin"}, "not a safetensors file beside it"),
        ({"a": 7}, "not a safetensors file beside it"),
        ({"a": "model-9.safetensors"}, "the shard 'model-9.safetensors' is missing"),
        ({"a": "sub/model-1.safetensors"}, "not a safetensors file beside it"),
        ({"a": "..\\model-1.safetensors"}, "not a safetensors file beside it"),
        ({"a": "*.safetensors"}, "not a safetensors file beside it"),
        ({"a": ".safetensors"}, "not a safetensors file beside it"),
        ({"a": "a\n.safetensors"}, "not a safetensors file beside it"),
        ({f"t{i}": f"{i}.safetensors" for i in range(5000)}, "names 5000 shards; at most 4096"),
        ({"a": ["model-1.safetensors"]}, "not a safetensors file beside it"),
        ({"a": "model-1.safetensors", "c": "model-2.safetensors"}, "disagree about 'b'"),
        ({"a": "model-1.safetensors", "b": "model-1.safetensors"}, "disagree about 'b'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: dict[str, object], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        check_folder(shard(write_folder(tmp_path / "m"), weight_map))


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    folder = shard(write_folder(tmp_path / "m"), {})
    (folder / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}')
    with pytest.raises(StoreError, match=r"index\.json is not valid JSON: a name appears twice"):
        check_folder(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = shard(write_folder(tmp_path / "m"), {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "model-2.safetensors")
    with pytest.raises(StoreError, match="disagree about 'a'"):
        check_folder(folder)


def test_a_shard_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    folder = shard(write_folder(tmp_path / "m"), {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    data = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"model-2\.safetensors: the tensors end at byte"):
        check_folder(folder)


def test_links_that_lead_out_or_nowhere_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    folder = shard(write_folder(tmp_path / "m"), {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    (folder / "model-2.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model-2.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(StoreError, match=r"model-2\.safetensors is a link out of the folder"):
        check_folder(folder)
    (folder / "model-2.safetensors").unlink()
    (folder / "model-2.safetensors").symlink_to("model-2.safetensors")
    with pytest.raises(StoreError, match=r"model-2\.safetensors is a link that leads nowhere"):
        check_folder(folder)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(StoreError, match=r"config\.json is not a plain file"):
        check_folder(folder)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(StoreError, match=r"\(a tokenizer\.model is not read\); load .* AutoTokenizer and save it"):
        check_folder(folder, is_source=True)
