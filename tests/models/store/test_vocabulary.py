"""GPT-2's and OPT's two-file tokenizers become tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer

from models.store import StoreError, pull, resolve
from models.store.manifest import MANIFEST
from tests.models.store.texts import varied_texts
from tests.models.store.world import SPECIAL, TOKENS, write_folder, write_vocabulary


def published(folder: Path, **settings: Any) -> Path:
    """A model folder whose tokenizer is a vocabulary."""
    write_folder(folder)
    (folder / "tokenizer.json").unlink()
    write_vocabulary(folder, **settings)
    return folder


def test_the_ids_are_those_of_the_tokenizer_class(tmp_path: Path) -> None:
    source = published(tmp_path / "gpt2")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = pull(str(source), store=tmp_path / "store")

    assert folder == resolve(str(source), tmp_path / "store") != source
    assert folder.parent == tmp_path / "store"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before  # the source stays as it was
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", MANIFEST,
    }  # fmt: skip
    assert (folder / "model.safetensors").samefile(source / "model.safetensors")  # not copied
    assert not (folder / "config.json").samefile(source / "config.json")

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = GPT2Tokenizer.from_pretrained(source)
    for text in [*varied_texts(200), f"hello{SPECIAL[0]} world"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_it_is_made_once_and_again_when_the_source_changes(tmp_path: Path) -> None:
    source, store = published(tmp_path / "gpt2"), tmp_path / "store"
    phases: list[str] = []

    def bring() -> Path:
        phases.clear()
        return pull(str(source), store=store, progress=lambda phase, done, total: phases.append(phase))

    folder = bring()
    assert phases
    assert bring() == folder
    assert not phases
    (source / "merges.txt").write_text("#version: 0.2\nh e\n")
    assert bring() != folder
    assert phases


def test_opt_begins_every_text_with_its_mark(tmp_path: Path) -> None:
    source = published(tmp_path / "opt", add_bos_token=True, bos_token=SPECIAL[1])
    ours = Tokenizer.from_file(str(pull(str(source), store=tmp_path / "store") / "tokenizer.json"))
    assert ours.encode("hello").tokens == [SPECIAL[1], "hello"]
    assert ours.encode("hello", add_special_tokens=False).tokens == ["hello"]


VOCAB = {token: index for index, token in enumerate(TOKENS)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", json.dumps(VOCAB | {"x1": 10**9}), "does not number its 265 tokens from 0 to 264"),
        ("vocab.json", json.dumps(VOCAB | {"x1": "5"}), "does not number"),
        ("vocab.json", json.dumps(VOCAB | {"x1": -1}), "does not number"),
        ("vocab.json", '{"a": 0, "a": 1}', "a name appears twice"),
        ("vocab.json", "[1]", "not a JSON object"),
        ("merges.txt", "#version: 0.2\nq q\n", "'q q' does not join two tokens of vocab.json"),
        ("merges.txt", "hello\n", "'hello' does not join two tokens"),
        ("merges.txt", b"\xff\xfe", r"merges\.txt is not UTF-8"),
        ("tokenizer_config.json", '{"bos_token": 7}', "bos_token is 7, which is no token"),
        ("tokenizer_config.json", '{"bos_token": "<nowhere>"}', "special token '<nowhere>' is not in vocab.json"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "names no bos_token"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    source = published(tmp_path / "gpt2")
    (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StoreError, match=message):
        pull(str(source), store=tmp_path / "store")
    assert not resolve(str(source), tmp_path / "store").exists()
