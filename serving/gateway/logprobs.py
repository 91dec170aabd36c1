"""Log-probabilities of output tokens in OpenAI's two shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from serving.wire import unpack_logprobs

LOWEST = -9999.0
"""What JSON shows for minus infinity, as OpenAI does."""


class TokenEntry(NamedTuple):
    """One output token as a reply reports it."""

    token_id: int
    offset: int  # characters of output text before it
    packed: bytes  # wire.Step's logprob entry; b"" = none asked for


@dataclasses.dataclass(frozen=True, slots=True)
class TokenNames:
    """How token ids are written: their text, or "token_id:N" (tokens_as_ids)."""

    token_bytes: Callable[[int], bytes]
    tokens_as_ids: bool = False

    def of(self, token_id: int, escape_prefix: str = "") -> str:
        """Text of the token; bytes that are not whole characters are escaped, so no two differ in
        nothing but lost bytes (OpenAI writes `bytes:\\xe2\\x80` in completions, without the prefix
        in chat)."""
        if self.tokens_as_ids:
            return f"token_id:{token_id}"
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return escape_prefix + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(entries: Sequence[TokenEntry], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions: parallel arrays; each top_logprobs also holds the
    sampled token."""
    tokens, values, tops = [], [], []
    for entry in entries:
        logprob, alternatives = unpack_logprobs(entry.packed)
        name = names.of(entry.token_id, "bytes:")
        top = {name: _finite(logprob)}
        for token_id, value in alternatives:
            top.setdefault(names.of(token_id, "bytes:"), _finite(value))
        tokens.append(name)
        values.append(_finite(logprob))
        tops.append(top)
    offsets = [entry.offset for entry in entries]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(entries: Sequence[TokenEntry], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions: one object per token."""
    content = []
    for entry in entries:
        logprob, alternatives = unpack_logprobs(entry.packed)
        item = _chat_token(entry.token_id, logprob, names)
        item["top_logprobs"] = [_chat_token(token_id, value, names) for token_id, value in alternatives]
        content.append(item)
    return {"content": content}


def _chat_token(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.of(token_id), "logprob": _finite(logprob), "bytes": list(names.token_bytes(token_id))}


def _finite(value: float) -> float:
    return value if value > LOWEST else LOWEST
