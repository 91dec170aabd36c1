"""Tokenizer files out of a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece's ("llama")."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from models.store.errors import StoreError
from models.store.gguf_file import GgufFile
from models.store.gguf_sentencepiece import SPACE, sentencepiece
from models.store.gguf_splitting import SPLITTINGS, UNNAMED, UNNAMED_SPLITTINGS, Splitting

# Token types of ggml's vocabulary (llama.h: enum llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_PADDING = re.compile(r"\[PAD\d+\]")  # what llama.cpp's converter calls the rows that a wide embedding has too many


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id with their types."""

    tokens: list[str]
    types: list[int]

    def of_type(self, *kinds: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]


def tokenizer_files(file: GgufFile) -> dict[str, Any]:
    """tokenizer.json (str), tokenizer_config.json (dict) and, if there is one, chat_template.jinja (str).

    Raises StoreError for other vocabularies, for unknown splitting rules, and for metadata that contradicts itself.
    """
    architecture = file.require("general.architecture", str)
    vocabulary = _vocabulary(file, architecture)
    match file.require("tokenizer.ggml.model", str):
        case "gpt2":
            splitting = _splitting(file, architecture)
            tokenizer, adds_bos, has_prefix = _byte_level(file, vocabulary, splitting), splitting.adds_bos, False
        case "llama":
            has_prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
            tokenizer, adds_bos = _sentencepiece(file, vocabulary, architecture, has_prefix), True
        case other:
            raise StoreError(
                f"{file.path.name}: the tokenizer type {other!r} is not supported ('gpt2', byte-level BPE, "
                "and 'llama', SentencePiece's, are); pull the model's Hugging Face folder instead"
            )
    adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, adds_bos)
    adds_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)
    ids = {
        name: _token_id(file, f"tokenizer.ggml.{key}_token_id", vocabulary)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    special = {f"{name}_token": vocabulary.tokens[index] for name, index in ids.items() if index is not None}
    tokenizer.add_tokens(list(_added(vocabulary, set(special.values()))))
    _frame(file, tokenizer, vocabulary, ids["bos"] if adds_bos else None, ids["eos"] if adds_eos else None)
    for name, wanted in (("bos", adds_bos), ("eos", adds_eos)):
        if wanted and ids[name] is None:
            raise StoreError(f"{file.path.name}: add_{name}_token is set but there is no {name}_token_id")
    files: dict[str, Any] = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": {
            # The class that takes tokenizer.json as it is; model-specific ones rebuild their own splitting rule.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": adds_bos,
            "add_eos_token": adds_eos,
            "add_prefix_space": has_prefix,
            "clean_up_tokenization_spaces": False,
            "model_max_length": file.require(f"{architecture}.context_length", int),
            **special,
        },
    }
    template = file.get("tokenizer.chat_template", str)
    if template:
        files["chat_template.jinja"] = template
    return files


def _vocabulary(file: GgufFile, architecture: str) -> Vocabulary:
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = file.require("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise StoreError(f"{file.path.name}: {len(tokens)} tokens but {len(types)} token types")
    size = len(tokens)
    while size and types[size - 1] == _UNUSED and _PADDING.fullmatch(tokens[size - 1]):
        size -= 1
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens[:size])]  # as llama.cpp calls them
    if architecture == "gemma3":  # whose runs of spaces are spelt out; its merges know them as they are everywhere else
        tokens = [SPACE * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
    if len(set(tokens)) != len(tokens):
        raise StoreError(f"{file.path.name}: the vocabulary has {len(tokens) - len(set(tokens))} duplicate tokens")
    return Vocabulary(tokens, types[:size])


def _splitting(file: GgufFile, architecture: str) -> Splitting:
    name = file.get("tokenizer.ggml.pre", str, UNNAMED)
    splitting = UNNAMED_SPLITTINGS.get(architecture) if name == UNNAMED else SPLITTINGS.get(name)
    if splitting is None:
        known = f"{', '.join(SPLITTINGS)} are"
        raise StoreError(
            f"{file.path.name}: the splitting rule {name!r} of its tokenizer is not supported ({known}); "
            "pull the model's Hugging Face folder instead"
        )
    return splitting


def _byte_level(file: GgufFile, vocabulary: Vocabulary, splitting: Splitting) -> Tokenizer:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges: list[tuple[str, str]] = []
    for line in _strings(file, "tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not space or left not in ids or right not in ids or left + right not in ids:
            raise StoreError(f"{file.path.name}: the merge {line!r} does not join two tokens of the vocabulary")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=splitting.takes_whole_words))
    if splitting.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary, architecture: str, has_prefix: bool) -> Tokenizer:
    scores = file.require("tokenizer.ggml.scores", list)[: len(vocabulary.tokens)]
    if len(scores) != len(vocabulary.tokens):
        raise StoreError(f"{file.path.name}: {len(vocabulary.tokens)} tokens but {len(scores)} scores")
    if missing := 256 - len(set(vocabulary.of_type(_BYTE)) & {f"<0x{byte:02X}>" for byte in range(256)}):
        raise StoreError(f"{file.path.name}: {missing} of the 256 byte tokens are missing")
    if architecture == "gemma3":  # its scores do not follow its merges; the order of its tokens does
        scores = [-float(index) for index in range(len(scores))]
    is_run = [not token.strip(SPACE) for token in vocabulary.tokens]
    mergeable = [
        kind == _NORMAL or (kind == _USER_DEFINED and run) for kind, run in zip(vocabulary.types, is_run, strict=True)
    ]
    unknown = vocabulary.of_type(_UNKNOWN)
    try:
        return sentencepiece(vocabulary.tokens, scores, mergeable, unknown[0] if unknown else None, has_prefix)
    except ValueError as error:
        raise StoreError(f"{file.path.name}: {error}") from None


def _added(vocabulary: Vocabulary, special: set[str]) -> Iterator[AddedToken]:
    """Tokens that are found in a text before it is split: markup and, not special, the model's own long words.

    special: tokens that are markup whatever their type says (some converters left them normal).
    """
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == _CONTROL or token in special:
            yield AddedToken(token, normalized=False, special=True)
        elif kind == _USER_DEFINED and token.strip(SPACE):
            yield AddedToken(token, normalized=False, special=False)


def _frame(file: GgufFile, tokenizer: Tokenizer, vocabulary: Vocabulary, bos: int | None, eos: int | None) -> None:
    """Have the tokenizer put these ids around a text."""
    if bos is None and eos is None:
        return
    before, after = ["bos"] if bos is not None else [], ["eos"] if eos is not None else []
    named: list[Any] = [
        {"id": name, "ids": [index], "tokens": [vocabulary.tokens[index]]}
        for name, index in (("bos", bos), ("eos", eos))
        if index is not None
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{name}:1" for name in before), "$B:1", *(f"{name}:1" for name in after)],
        special_tokens=named,
    )


def _strings(file: GgufFile, key: str) -> list[str]:
    values: list[str] = file.require(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise StoreError(f"{file.path.name}: metadata {key!r} is not a list of strings")
    return values


def _token_id(file: GgufFile, key: str, vocabulary: Vocabulary) -> int | None:
    index: int | None = file.get(key, int)
    if index is not None and not 0 <= index < len(vocabulary.tokens):
        raise StoreError(f"{file.path.name}: {key} is {index}, but the vocabulary has {len(vocabulary.tokens)} tokens")
    return index
