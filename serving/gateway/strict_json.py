"""Request bodies: JSON without the parts on which parsers disagree.

Refused beside plain syntax errors: a byte order mark, duplicate keys, nesting deeper than
`MAX_DEPTH`, lone surrogates, and numbers that no double holds. All checks run at C speed over the
bytes, because a body may be two megabytes and the event loop parses it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

from serving.errors import InvalidJson

MAX_DEPTH = 16
MAX_CONTAINERS = 20_000
"""Arrays and objects in one body: an empty one takes two bytes to send and over sixty to hold."""
MAX_EXPLAINED_BYTES = 64 << 10
"""Bodies up to this size are parsed a second time, slowly, to name the field that is wrong."""

_STRUCTURE = b'"[]{}:'
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in _STRUCTURE)


class NotJson:
    """Stands for a literal that JSON does not have (NaN, Infinity, 1e999) in a body under diagnosis."""

    def __init__(self, literal: str) -> None:
        self.literal = literal

    def __repr__(self) -> str:
        return self.literal[:40]


def decode(body: bytes) -> Any:
    """The value of a JSON document.

    Numbers that are not representable are returned as `NotJson`, so that the field's own check can
    name it; every other fault raises InvalidJson.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        raise InvalidJson("The request body begins with a byte order mark; send plain UTF-8.")
    num_keys = _check_structure(body)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return _explain(body, error)
    if num_keys != _count_keys(value):
        raise InvalidJson(f"The request body has a duplicate key{_duplicate(body)}.")
    return value


def _check_structure(body: bytes) -> int:
    """Number of object members in the text. Raises InvalidJson when it nests too deep.

    A string's inside is cut away by removing escaped characters and then every odd part between
    quotes; innermost pairs of brackets are then removed once per permitted level.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.translate(None, _NOT_STRUCTURE).split(b'"')[::2])
    num_keys = outside.count(b":")
    brackets = outside.replace(b":", b"")
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise InvalidJson(f"The request body has more than {MAX_CONTAINERS} arrays and objects.")
    for _ in range(MAX_DEPTH):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"\0").replace(b"{}", b"\0").replace(b"\0", b"")
    if brackets and b"[]" in brackets.replace(b"{}", b"[]"):
        raise InvalidJson(f"The request body nests deeper than {MAX_DEPTH} levels.")
    return num_keys


def _count_keys(value: Any) -> int:
    if type(value) is not dict:
        return sum(map(_count_keys, _containers(value))) if type(value) is list else 0
    return len(value) + sum(map(_count_keys, _containers(value.values())))


def _containers(values: Any) -> list[Any]:
    return [value for value in values if type(value) is dict or type(value) is list]


def _duplicate(body: bytes) -> str:
    """`: 'name'` of the first duplicate key, for the message."""
    if len(body) > MAX_EXPLAINED_BYTES:
        return ""
    found: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        found.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)

    json.loads(body, object_pairs_hook=keep)
    return f": {found[0][:64]!r}" if found else ""


def _explain(body: bytes, error: Exception) -> Any:
    """What Python's forgiving parser sees in a body that the strict one refused."""
    if len(body) > MAX_EXPLAINED_BYTES:
        raise InvalidJson("The request body is not valid JSON.") from None

    def number(text: str) -> Any:
        value = float(text)
        return NotJson(text) if value in (float("inf"), float("-inf")) else value

    def integer(text: str) -> Any:
        return int(text) if len(text) < 64 else NotJson(text)

    try:
        value = json.loads(body.decode(), parse_float=number, parse_int=integer, parse_constant=NotJson)
    except UnicodeDecodeError:
        raise InvalidJson("The request body is not valid UTF-8.") from None
    except json.JSONDecodeError as fault:
        place = f"line {fault.lineno} column {fault.colno}"
        raise InvalidJson(f"The request body is not valid JSON: {fault.msg} at {place}.") from None
    except (ValueError, RecursionError):
        raise InvalidJson("The request body is not valid JSON.") from None
    if type(value) is not dict:
        raise InvalidJson("The request body is not valid JSON.") from error
    return Suspect(value)


class Suspect(dict[str, Any]):
    """An object that strict JSON refuses: if every field's own check passes, the body is still refused."""
