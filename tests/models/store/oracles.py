"""Tokenizers written out: the definitions, with nothing made fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import regex

Split = Callable[[str], list[str]]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(rest)}


def split_by(*patterns: str) -> Split:
    """Each pattern cuts the pieces of the one before it into its matches and what lies between them."""
    compiled = [regex.compile(pattern) for pattern in patterns]

    def split(text: str) -> list[str]:
        pieces = [text]
        for pattern in compiled:
            pieces = [part for piece in pieces for part in _cut(pattern, piece)]
        return pieces

    return split


def _cut(pattern: regex.Pattern[str], text: str) -> Iterable[str]:
    at = 0
    for match in pattern.finditer(text):
        if match.end() > match.start():
            if match.start() > at:
                yield text[at : match.start()]
            yield match[0]
            at = match.end()
    if at < len(text):
        yield text[at:]


class ByteLevelBpe:
    """Byte-level BPE: in every piece the pair of the lowest rank is joined, the leftmost first, while there is one.

    Bytes that have no token vanish, as they do in the `tokenizers` library and in llama.cpp.
    """

    def __init__(
        self, tokens: list[str], merges: list[str], added: dict[str, int], split: Split, *, takes_whole: bool = False
    ) -> None:
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {tuple(line.split(" ", 1)): rank for rank, line in enumerate(merges)}
        self._added = added
        self._markup = (
            regex.compile("|".join(map(regex.escape, sorted(added, key=len, reverse=True)))) if added else None
        )
        self._split = split
        self._takes_whole = takes_whole
        self._alphabet = byte_alphabet()
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _cut(self._markup, text) if self._markup else [text]:
            if piece in self._added:
                ids.append(self._added[piece])
            else:
                for word in self._split(piece):
                    if word not in self._known:
                        self._known[word] = self._merge(word)
                    ids += self._known[word]
        return ids

    def _merge(self, word: str) -> list[int]:
        parts = [self._alphabet[byte] for byte in word.encode()]
        if self._takes_whole and "".join(parts) in self._ids:
            return [self._ids["".join(parts)]]
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, 1 << 30) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == 1 << 30:
                break
            joined: list[str] = []
            at = 0
            while at < len(parts):
                if at < len(ranks) and ranks[at] == best:
                    joined.append(parts[at] + parts[at + 1])
                    at += 2
                else:
                    joined.append(parts[at])
                    at += 1
            parts = joined
        return [self._ids[part] for part in parts if part in self._ids]


def sentencepiece_bpe(text: str, pieces: dict[str, tuple[int, float]], byte_ids: list[int]) -> list[int]:
    """SentencePiece's BPE of a text whose spaces are "▁": of all neighbours the union with the highest score is made,
    the leftmost at equal ones; characters without a piece become bytes. pieces: {piece: (id, score)}."""
    parts = list(text)
    while True:
        best, place = float("-inf"), -1
        for at in range(len(parts) - 1):
            found = pieces.get(parts[at] + parts[at + 1])
            if found is not None and found[1] > best:
                best, place = found[1], at
        if place < 0:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [pieces[part][0]] if part in pieces else [byte_ids[byte] for byte in part.encode()]
    return ids
