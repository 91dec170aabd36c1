"""Tokenizer files out of a GGUF file's metadata: byte-level BPE only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from models.store.errors import StoreError
from models.store.gguf_file import GgufFile

# Token types of ggml's vocabulary (llama.h: enum llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# Splitting rules by `tokenizer.ggml.pre`, as the models' own tokenizer.json have them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}


def tokenizer_files(file: GgufFile) -> dict[str, Any]:
    """tokenizer.json (str), tokenizer_config.json (dict) and, if there is one, chat_template.jinja (str).

    Raises StoreError for vocabularies other than byte-level BPE and for unknown splitting rules.
    """
    model = file.require("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise StoreError(
            f"{file.path.name}: the tokenizer type {model!r} is not supported (byte-level BPE, 'gpt2', is); "
            "pull the model's Hugging Face folder instead"
        )
    pre = file.get("tokenizer.ggml.pre", str, "default")
    if pre not in _PRE_TOKENIZERS:
        raise StoreError(
            f"{file.path.name}: the splitting rule {pre!r} is not supported ({', '.join(_PRE_TOKENIZERS)} are); "
            "pull the model's Hugging Face folder instead"
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = file.require("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise StoreError(f"{file.path.name}: {len(tokens)} tokens but {len(types)} token types")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise StoreError(f"{file.path.name}: the vocabulary has {len(tokens) - len(vocab)} duplicate tokens")

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(file, vocab), ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added])

    special = {
        name: _token(file, f"tokenizer.ggml.{key}_token_id", tokens)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe")
    if adds_bos:
        bos = special["bos"]
        if bos is None:
            raise StoreError(f"{file.path.name}: add_bos_token is set but there is no bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; model-specific ones rebuild their own splitting rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.require(f"{file.require('general.architecture', str)}.context_length", int),
    }
    config |= {f"{name}_token": token for name, token in special.items() if token is not None}
    files: dict[str, Any] = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": config}
    template = file.get("tokenizer.chat_template", str)
    if template:
        files["chat_template.jinja"] = template
    return files


def _strings(file: GgufFile, key: str) -> list[str]:
    values: list[str] = file.require(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise StoreError(f"{file.path.name}: metadata {key!r} is not a list of strings")
    return values


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in _strings(file, "tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise StoreError(f"{file.path.name}: the merge {line!r} does not join two tokens of the vocabulary")
        merges.append((left, right))
    return merges


def _token(file: GgufFile, key: str, tokens: list[str]) -> str | None:
    index = file.get(key, int)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise StoreError(f"{file.path.name}: {key} is {index}, but the vocabulary has {len(tokens)} tokens")
    token: str = tokens[index]
    return token
