"""Keeping what a user types apart from what a chat template writes.

A template marks turns with special tokens, as text: `<|im_end|>`. The same text typed by a user must stay text,
or a message could end its own turn and speak as somebody else. Messages are therefore guarded before they are
rendered: special text in them is put behind a mark that nobody can guess. In the rendered prompt every special
text that is left was made by the template; it becomes a private name, which a second tokenizer knows instead
of the public one, and the marks are taken off again. The whole prompt is still encoded in one piece, so its ids
are those of the public tokenizer wherever users type no special text.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

# Markers that some vocabularies do not flag as special: <|user|>, <｜Assistant｜>.
_LOOKS_SPECIAL = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)


class SpecialText:
    """Guards messages and reveals prompts for one tokenizer. Immutable; safe in any thread."""

    def __init__(self, config: Mapping[str, Any], nonce: str | None = None) -> None:
        """config: tokenizer.json. nonce: lower-case letters and digits, drawn when None."""
        nonce = nonce or secrets.token_hex(16)
        tokens = [
            token
            for token in config.get("added_tokens") or ()
            if token.get("special") or _LOOKS_SPECIAL.fullmatch(token["content"])
        ]
        names = [token["content"] for token in tokens]
        # Letters and digits survive what templates do to content: trim, tojson. Private-use characters around
        # the private names are no word characters and no normaliser knows them.
        self._mark = f"q{nonce}q"
        self.cut = f"q{nonce}cut"  # appended to a message that is to be continued
        self._private = {name: f"\ue000{nonce}.{place}\ue001" for place, name in enumerate(names)}
        self._heads = {name[:size] for name in names for size in range(1, len(name))}
        self._tails = {name[-size:] for name in names for size in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        tokens.sort(key=lambda token: len(token["content"]), reverse=True)  # the longest match counts
        self._special = re.compile("|".join(re.escape(token["content"]) for token in tokens)) if tokens else None
        hidden = rf"{self._mark}((?:[0-9a-f]{{2}})+)z"
        self._revealed = re.compile(f"{hidden}|({'|'.join(map(_pattern, tokens)) or '(?!)'})")

    def guard(self, value: Any) -> Any:
        """A copy of JSON-like data whose strings hold no special text, nor a part of one at either end.

        The ends matter because a template may join two messages.
        """
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(item) for item in value]
        return value

    def reveal(self, prompt: str) -> str:
        """The prompt for the private tokenizer: template-made special text renamed, marks taken off."""

        def replace(match: re.Match[str]) -> str:
            hidden: str | None = match[1]
            return self._private[match[2]] if hidden is None else bytes.fromhex(hidden).decode()

        return self._revealed.sub(replace, prompt)

    def unguard(self, prompt: str) -> str:
        """The prompt as the template would have made it from unguarded messages."""
        return self._revealed.sub(lambda match: match[2] or bytes.fromhex(match[1]).decode(), prompt)

    def private_tokenizer(self, config: Mapping[str, Any]) -> bytes:
        """tokenizer.json in which special tokens have their private names, with the same ids.

        Post-processing is left out: templates write their own beginning of sequence.
        """
        renamed = copy.copy(dict(config))
        renamed["added_tokens"] = [
            {**token, "content": self._rename(token["content"])} for token in config.get("added_tokens") or ()
        ]
        renamed["post_processor"] = renamed["truncation"] = renamed["padding"] = None
        model = dict(config["model"])
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {self._rename(token): index for token, index in vocab.items()}
        elif isinstance(vocab, list):  # Unigram: [[token, score], …]
            model["vocab"] = [[self._rename(token), score] for token, score in vocab]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._rename(model["unk_token"])
        renamed["model"] = model
        return msgspec.json.encode(renamed)

    @property
    def names(self) -> list[str]:
        """The special texts, as the public tokenizer knows them."""
        return list(self._private)

    def _rename(self, token: str) -> str:
        return self._private.get(token, token)

    def _guard(self, text: str) -> str:
        if self._special is None or not text:
            return text
        text = self._special.sub(lambda match: self._hide(match[0]), text)
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._heads:
                text = text[:-size] + self._hide(text[-size:])
                break
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[:size] in self._tails:
                return self._hide(text[:size]) + text[size:]
        return text

    def _hide(self, text: str) -> str:
        return f"{self._mark}{text.encode().hex()}z"


def _pattern(token: Mapping[str, Any]) -> str:
    """Where the tokenizer finds this added token: one flagged `single_word` not within a word."""
    name = re.escape(token["content"])
    return rf"(?<!\w){name}(?!\w)" if token.get("single_word") else name
