"""From a choice's journal to the bytes of a reply.

A `Rendering` reads the journal at its own pace and turns every token into at most one event, which
depends on the tokens so far and on nothing else (C21): not on how frames were cut, not on when the
client read. The parts of an event that never change are spliced around the token's text, which is
the only thing that is encoded per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from serving.gateway.continuation import Continuation
from serving.gateway.logprobs import TokenEntry
from serving.gateway.streams import Choice
from serving.types import FinishReason

_encode = msgspec.json.Encoder().encode

REASONS = {FinishReason.LENGTH: "length", FinishReason.STOP: "stop"}

# Line ends to some clients' decoders although JSON allows them raw.
_LINE_ENDS = (("\x85".encode(), b"\\u0085"), ("\u2028".encode(), b"\\u2028"), ("\u2029".encode(), b"\\u2029"))


def json_text(text: str) -> bytes:
    """The text as a JSON string on one line, whatever a client counts as a line end."""
    data = _encode(text)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            data = data.replace(raw, escaped)
    return data


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventShape:
    """What the events of one choice look like around its text."""

    head: bytes  # up to where the text, or chat's delta, begins
    text_open: bytes  # around the text: b'{"content":' and b"}" in chat, nothing in completions
    text_close: bytes
    no_text: bytes  # instead of an empty text in a last event: b'{}' in chat
    tail: bytes  # after the choice's object: `],"system_fingerprint":…`, without the closing brace
    prelude: bytes = b""  # events before the first token: chat's role
    first_extra: bytes = b""  # members of the first event's choice: its prompt ids
    has_stop_reason: bool = True  # in every event; else in the last only


@dataclasses.dataclass(frozen=True, slots=True)
class Extras:
    """What a reply reports per token beside its text."""

    logprobs: Callable[[Sequence[TokenEntry]], dict[str, Any]] | None = None
    token_ids: bool = False
    usage: Callable[[int], dict[str, Any]] | None = None  # of the choice, by its number of tokens


class Rendering:
    """One choice's journal on its way to a client. Subclasses say what a token becomes."""

    __slots__ = (
        "at",
        "choice",
        "continuation",
        "grown_at",
        "is_dirty",
        "is_over",
        "keeps_entries",
        "num_known",
        "wants_logprobs",
    )

    def __init__(self, choice: Choice, continuation: Continuation, extras: Extras) -> None:
        self.choice = choice
        self.continuation = continuation
        self.wants_logprobs = extras.logprobs is not None
        self.keeps_entries = self.wants_logprobs or extras.token_ids
        self.at = 0  # tokens read from the journal
        self.is_over = False
        self.is_dirty = False  # waits in its exchange's list
        self.num_known = 0  # tokens of the journal at the last frame
        self.grown_at: float | None = None  # when the journal last grew

    def feed(self, token_id: int, logprobs: bytes | None) -> bytes:
        """The event of one more token, b"" when it shows nothing yet. Sets is_over at the last."""
        raise NotImplementedError

    def close(self, reason: str) -> bytes:
        """The last event, for a row that the engine ended before the token rules did."""
        raise NotImplementedError

    def drain(self, max_bytes: int) -> bytes:
        """Events of the journal's unread tokens, until about max_bytes.

        Whether any are left unread shows in `has_more`.
        """
        if self.is_over:
            return b""
        choice = self.choice
        ids = choice.output_ids
        end = len(ids)
        at = self.at
        if end - at == 1 and not self.wants_logprobs:  # nearly always
            self.at = end
            data = self.feed(ids[at], None)
        else:
            events = []
            size = 0
            while at < end and size < max_bytes and not self.is_over:
                event = self.feed(ids[at], choice.logprobs[at] if self.wants_logprobs else None)
                events.append(event)
                size += len(event) + 8  # a token without an event is work as well
                at += 1
            self.at = at
            data = b"".join(events)
        if self.at == end and choice.finish is not None and not self.is_over:
            data += self.close(REASONS[choice.finish])
        return data

    @property
    def is_inexact(self) -> bool:
        """Whether the choice moved between replicas that do not compute the same bits (C4)."""
        return self.choice.num_resumes > 0 and self.choice.request.card.determinism != "exact"

    @property
    def has_more(self) -> bool:
        return not self.is_over and self.at < len(self.choice.output_ids)


class EventRendering(Rendering):
    """A streamed choice: server-sent events."""

    __slots__ = (
        "_close_plain",
        "_entries",
        "_extras",
        "_has_told",
        "_is_first",
        "_is_plain",
        "_open_plain",
        "_shape",
        "_stop_reason_null",
    )

    def __init__(self, choice: Choice, continuation: Continuation, shape: EventShape, extras: Extras) -> None:
        super().__init__(choice, continuation, extras)
        self._shape = shape
        self._extras = extras
        self._entries: list[TokenEntry] = []  # tokens that no event has reported
        self._is_first = True
        self._has_told = False  # that the stream moved and may differ from here on
        self._stop_reason_null = b',"stop_reason":null' if shape.has_stop_reason else b""
        self._open_plain = b"data: " + shape.head + shape.text_open
        self._close_plain = (
            shape.text_close
            + b',"logprobs":null,"finish_reason":null'
            + self._stop_reason_null
            + b"}"
            + shape.tail
            + b"}\n\n"
        )
        self._is_plain = not self.keeps_entries and extras.usage is None

    def drain(self, max_bytes: int) -> bytes:
        data = super().drain(max_bytes)
        if data and not self._has_told and self.is_inexact:
            self._has_told = True
            return b": resumed approximate\n" + data
        return data

    def feed(self, token_id: int, logprobs: bytes | None) -> bytes:
        continuation = self.continuation
        if self.keeps_entries:
            self._entries.append(TokenEntry(token_id, continuation.decoded_len, logprobs or b""))
        text = continuation.feed(token_id)
        if continuation.finish_reason is not None:
            return self._last(text)
        if not text:
            return b""
        if self._is_plain and not self._is_first:
            return b"".join((self._open_plain, json_text(text), self._close_plain))
        return self._full(text, False)

    def close(self, reason: str) -> bytes:
        return self._last(self.continuation.close(reason))

    def _last(self, text: str) -> bytes:
        self.is_over = True
        return self._full(text, True)

    def _full(self, text: str, is_last: bool) -> bytes:
        """Any event, with everything that it may carry."""
        shape, extras, continuation = self._shape, self._extras, self.continuation
        parts = [shape.prelude if self._is_first else b"", b"data: ", shape.head]
        if text or not is_last:
            parts += [shape.text_open, json_text(text), shape.text_close]
        else:
            parts.append(shape.no_text)
        parts.append(b',"logprobs":')
        parts.append(_encode(extras.logprobs(self._entries) if extras.logprobs else None))
        parts += [b',"finish_reason":', _encode(continuation.finish_reason)]
        if is_last:
            parts += [b',"stop_reason":', _encode(continuation.stop_reason)]
        else:
            parts.append(self._stop_reason_null)
        if extras.token_ids:
            parts += [b',"token_ids":', _encode([entry.token_id for entry in self._entries])]
        if self._is_first:
            parts.append(shape.first_extra)
        if is_last and self.is_inexact:
            parts.append(b',"resumed":"approximate"')
        parts += [b"}", shape.tail]
        if extras.usage is not None:
            parts += [b',"usage":', _encode(extras.usage(continuation.num_tokens))]
        parts.append(b"}\n\n")
        self._entries.clear()
        self._is_first = False
        return b"".join(parts)


class WholeRendering(Rendering):
    """A choice of a whole reply: text and tokens, collected as they come.

    Log-probabilities are encoded token by token: a reply of a million of them must not stop the event loop
    at its end, and takes its bytes of memory and not its objects.
    """

    __slots__ = ("_columns", "_extras", "_texts", "token_ids")

    def __init__(self, choice: Choice, continuation: Continuation, extras: Extras) -> None:
        super().__init__(choice, continuation, extras)
        self._extras = extras
        self._texts: list[str] = []
        self._columns: dict[str, bytearray] = {}  # of the logprobs object: its arrays, without brackets
        if extras.logprobs is not None:
            self._columns = {name: bytearray() for name in extras.logprobs(())}
        self.token_ids: list[int] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def logprobs(self) -> msgspec.Raw | None:
        """The choice's logprobs object, encoded."""
        if self._extras.logprobs is None:
            return None
        return msgspec.Raw(b"{%b}" % b",".join(b'"%b":[%b]' % (n.encode(), bytes(c)) for n, c in self._columns.items()))

    def feed(self, token_id: int, logprobs: bytes | None) -> bytes:
        continuation = self.continuation
        if self._extras.logprobs is not None:
            entry = TokenEntry(token_id, continuation.decoded_len, logprobs or b"")
            for name, values in self._extras.logprobs((entry,)).items():
                column = self._columns[name]
                if column:
                    column += b","
                column += _encode(values[0])
        if self._extras.token_ids:
            self.token_ids.append(token_id)
        text = continuation.feed(token_id)
        if text:
            self._texts.append(text)
        self.is_over = continuation.finish_reason is not None
        return b""

    def close(self, reason: str) -> bytes:
        self._texts.append(self.continuation.close(reason))
        self.is_over = True
        return b""
