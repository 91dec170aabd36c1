"""What each token id stands for: exact bytes and text, read from tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Bytes and text by token id.

    Two families of decoders are pure concatenations of bytes: byte-level BPE (GPT-2, Llama 3, Qwen) and
    SentencePiece with byte fallback (Llama 2, Mistral, Gemma). For these `is_concatenative` holds and text is
    the UTF-8 of the joined bytes; for any other, bytes are those of the token decoded alone.

    texts: per id, its text, or None when its bytes are not whole characters.
    """

    def __init__(self, raw: RawTokenizer, config: Mapping[str, Any], min_size: int = 0) -> None:
        """config: tokenizer.json. min_size: ids below it that are no token have no bytes."""
        tokens = {index: token for token, index in raw.get_vocab(with_added_tokens=True).items()}
        self.size = max(max(tokens, default=-1) + 1, min_size)
        self.special_ids = frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special)
        decoder = config.get("decoder")
        self.is_concatenative = True
        self.strips_first_space = False
        if _is_byte_level(decoder):
            table = _characters_to_bytes()
            found = {index: _byte_level(token, table) for index, token in tokens.items()}
        elif (strip := _sentencepiece_strip(decoder)) is not None:
            self.strips_first_space = strip
            found = {index: _sentencepiece(token) for index, token in tokens.items()}
        else:
            self.is_concatenative = False
            found = {index: raw.decode([index], skip_special_tokens=False).encode() for index in tokens}
        self.bytes: list[bytes] = [found.get(index, b"") for index in range(self.size)]
        self.texts: list[str | None] = [_whole_text(data) for data in self.bytes]
        self.texts_without_special: list[str | None] = list(self.texts)
        self.bytes_without_special: list[bytes] = list(self.bytes)
        for index in self.special_ids:
            self.texts_without_special[index] = ""
            self.bytes_without_special[index] = b""


def _is_byte_level(decoder: Any) -> bool:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        inner = decoder.get("decoders") or []
        return len(inner) == 1 and _is_byte_level(inner[0])
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"


def _sentencepiece_strip(decoder: Any) -> bool | None:
    """Whether the first space of a text is dropped; None when the decoder is not SentencePiece's."""
    if not isinstance(decoder, dict) or decoder.get("type") != "Sequence":
        return None
    steps = list(decoder.get("decoders") or [])
    if len(steps) not in (3, 4) or [step.get("type") for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    if steps[0].get("pattern") != {"String": "▁"} or steps[0].get("content") != " ":
        return None
    if len(steps) == 3:
        return False
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return True if steps[3] == strip else None


def _characters_to_bytes() -> dict[str, int]:
    """GPT-2's bijection of printable characters and bytes (Radford et al. 2019, encoder.py), inverted.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return table


def _byte_level(token: str, table: Mapping[str, int]) -> bytes:
    try:
        return bytes([table[character] for character in token])
    except KeyError:  # an added token with a space or another character outside the bijection: literal text
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
