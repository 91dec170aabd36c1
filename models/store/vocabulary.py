"""tokenizer.json out of the two files that GPT-2's tokenizer was published as, and OPT's still is.

`vocab.json` is {token: id}, `merges.txt` one merge per line under a line with the version (Radford et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.store.errors import StoreError
from models.store.files import read_json, read_text, write_synced

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = ("vocab.json", "merges.txt")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def needs_tokenizer(folder: Path) -> bool:
    """Whether the folder has a vocabulary instead of a tokenizer.json."""
    return not (folder / "tokenizer.json").exists() and all((folder / name).is_file() for name in VOCABULARY)


def write_tokenizer(sources: Mapping[str, Path], folder: Path) -> None:
    """Write tokenizer.json into `folder`, whose tokenizer_config.json and special_tokens_map.json name special tokens.

    sources: where the files of VOCABULARY are. Raises StoreError when they are not byte-level BPE.
    """
    vocab = read_json(sources["vocab.json"], is_strict=True)
    ids = list(vocab.values())
    if not all(type(index) is int for index in ids) or set(ids) != set(range(len(ids))):
        raise StoreError(f"vocab.json does not number its {len(vocab)} tokens from 0 to {len(vocab) - 1}")
    settings = _settings(folder)
    tokenizer = byte_level_bpe(vocab, _merges(read_text(sources["merges.txt"]), vocab))
    special = [settings[name] for name in _SPECIAL if name in settings]
    if missing := sorted(set(special) - vocab.keys()):
        raise StoreError(f"the special token {missing[0]!r} is not in vocab.json")
    from tokenizers import AddedToken, processors

    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if settings.get("add_bos_token"):
        bos = settings.get("bos_token")
        if bos is None:
            raise StoreError("tokenizer_config.json sets add_bos_token but names no bos_token")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    write_synced(folder / "tokenizer.json", tokenizer.to_str().encode())


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """GPT-2's tokenizer over a vocabulary, without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings, special tokens as plain strings."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    for name in _SPECIAL:
        token = settings.pop(name, None)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if not isinstance(token, str) or not token:
            raise StoreError(f"{name} is {token!r}, which is no token")
        settings[name] = token
    return settings


def _merges(text: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    # Only line feeds end a line: other characters that Python splits at are tokens.
    for line in text.split("\n"):
        if not line or line.startswith("#version"):
            continue
        left, space, right = line.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise StoreError(f"merges.txt: {line!r} does not join two tokens of vocab.json")
        merges.append((left, right))
    return merges
