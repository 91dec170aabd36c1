"""Token ids to text, one id at a time.

The text of a prefix of the ids never changes when more ids follow, and the concatenation of all deltas is a
function of the ids alone (C21). An incomplete UTF-8 character is held back; `finish` turns it into U+FFFD.
Resuming costs the last ids only: `prime_ids` give the context (the end of the prompt) and are never shown.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer as RawTokenizer

from serving.gateway.text.vocabulary import Vocabulary

NUM_PRIME_IDS = 16
"""How many ids before the output matter: more than any character or decoder rule spans."""

_MAX_HELD_IDS = 16
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """State of one choice."""

    def push(self, token_id: int) -> str:
        """Text that this id adds; "" while a character is incomplete. token_id < tokenizer_size."""
        ...

    def finish(self) -> str:
        """What was held back. Nothing may be pushed afterwards."""
        ...


def make_detokenizer(
    raw: RawTokenizer, vocabulary: Vocabulary, prime_ids: Sequence[int], skip_special_tokens: bool
) -> Detokenizer:
    """prime_ids: the ids before the output; only the last `NUM_PRIME_IDS` are looked at."""
    prime = prime_ids[-NUM_PRIME_IDS:]
    if vocabulary.is_concatenative:
        return ByteDetokenizer(vocabulary, prime, skip_special_tokens)
    return WindowDetokenizer(raw, prime, skip_special_tokens)


def push_all(detokenizer: Detokenizer, ids: Iterable[int]) -> str:
    """Text that these ids add."""
    return "".join([detokenizer.push(token_id) for token_id in ids])


class ByteDetokenizer:
    """For vocabularies whose decoder only joins bytes: one list look-up per id."""

    __slots__ = ("_bytes", "_pending", "_strip", "_texts")

    def __init__(self, vocabulary: Vocabulary, prime_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._texts = vocabulary.texts_without_special if skip_special_tokens else vocabulary.texts
        self._bytes = vocabulary.bytes_without_special if skip_special_tokens else vocabulary.bytes
        self._pending = b""
        self._strip = vocabulary.strips_first_space
        for token_id in prime_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        text = self._texts[token_id]
        if text is None or self._pending:
            data = self._pending + self._bytes[token_id]
            text, used = utf_8_decode(data, "replace", False)
            self._pending = data[used:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class WindowDetokenizer:
    """For any other decoder: the text of a short window of ids with and without the new one.

    The window starts one emission earlier than what is new, so that rules about the start of a text (WordPiece's
    and Metaspace's first word) do not apply in the middle. The idea is text-generation-inference's (model.py:
    decode_token, prefix_offset and read_offset).
    """

    __slots__ = ("_ids", "_num_shown", "_raw", "_shown", "_skip")

    def __init__(self, raw: RawTokenizer, prime_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._raw = raw
        self._skip = skip_special_tokens
        self._ids = list(prime_ids)
        self._num_shown = len(self._ids)
        self._shown = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_held = len(self._ids) - self._num_shown
        if len(text) <= len(self._shown) or (text.endswith(_REPLACEMENT) and num_held < _MAX_HELD_IDS):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        text = self._decode(self._ids)
        return self._advance(text) if len(text) > len(self._shown) else ""

    def _advance(self, text: str) -> str:
        delta = text[len(self._shown) :]
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        self._shown = self._decode(self._ids)
        return delta

    def _decode(self, ids: list[int]) -> str:
        text: str = self._raw.decode(ids, skip_special_tokens=self._skip)
        return text
