"""Kinds of request fields: each checks one value, says what it expects, and describes itself.

A check returns a value that cannot be wrong or raises InvalidRequest naming the parameter, the
limit and what was given. JSON's types are kept apart: true is no integer, 5.0 is no integer, "5"
is no number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, ClassVar, Protocol

from serving.errors import InvalidRequest, UnsupportedParameter
from serving.gateway.strict_json import NotJson

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What the served model permits."""

    tokenizer_size: int  # token ids are below this
    max_model_len: int


def shown(value: object) -> str:
    """A value as an error message quotes it: short, printable, on one line."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)[:40]


def wrong(param: str, expected: str, given: object, code: str = "invalid_value") -> InvalidRequest:
    """The error of a value out of range."""
    message = f"Invalid value for '{param}': expected {expected}, got {shown(given)}."
    return InvalidRequest(message, param=param, code=code)


def wrong_type(param: str, expected: str, given: object) -> InvalidRequest:
    """The error of a value of another JSON type."""
    return wrong(param, expected, given, "invalid_type")


def text(param: str, value: object, max_len: int | None = None) -> str:
    """A string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    if max_len is not None and len(value) > max_len:
        raise wrong(param, f"at most {max_len} characters", f"{len(value)} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"Invalid value for '{param}': it contains a lone surrogate.", param=param) from None
    return value


class Kind(Protocol):
    """One kind of value."""

    def check(self, param: str, value: Any, limits: Limits) -> Any: ...

    def describe(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Bool:
    def check(self, param: str, value: Any, limits: Limits) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(param, "true or false", value)
        return value

    def describe(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclasses.dataclass(frozen=True, slots=True)
class Int:
    low: int
    high: int

    def check(self, param: str, value: Any, limits: Limits) -> int:
        expected = f"an integer from {self.low} to {self.high}"
        if type(value) is not int:
            raise wrong_type(param, expected, value)
        if not self.low <= value <= self.high:
            raise wrong(param, expected, value)
        return value

    def describe(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclasses.dataclass(frozen=True, slots=True)
class Float:
    low: float
    high: float
    excludes_low: bool = False

    def check(self, param: str, value: Any, limits: Limits) -> float:
        expected = f"a number {'above' if self.excludes_low else 'from'} {self.low:g} to {self.high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(param, expected, value)
        # the range first: an integer beyond every double has no float
        if not self.low <= value <= self.high or (self.excludes_low and value == self.low):
            raise wrong(param, expected, value)
        number = float(value)
        if number == 0 and math.copysign(1, number) < 0:
            raise wrong(param, expected, value)
        return number

    def describe(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.excludes_low else "minimum"
        return {"type": "number", low: self.low, "maximum": self.high}


@dataclasses.dataclass(frozen=True, slots=True)
class Str:
    max_len: int
    forbidden: str = ""

    def check(self, param: str, value: Any, limits: Limits) -> str:
        checked = text(param, value, self.max_len)
        for character in self.forbidden:
            if character in checked:
                raise wrong(param, f"no {character!r} in it", value)
        return checked

    def describe(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": self.max_len}


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """Stop strings: one or several, without duplicates."""

    MAX_STRINGS: ClassVar[int] = 4
    MAX_LEN: ClassVar[int] = 256

    def check(self, param: str, value: Any, limits: Limits) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise wrong_type(param, "a string or an array of strings", value)
        if len(items) > self.MAX_STRINGS:
            raise wrong(param, f"at most {self.MAX_STRINGS} strings", value)
        for item in items:
            if text(param, item, self.MAX_LEN) == "":
                raise wrong(param, "strings that are not empty", item)
        return tuple(dict.fromkeys(items))

    def describe(self) -> dict[str, Any]:
        return {"type": ["string", "array"], "maxItems": self.MAX_STRINGS, "maxLength": self.MAX_LEN}


def token_id(param: str, value: object, limits: Limits) -> int:
    """An id of the model's tokenizer."""
    if type(value) is not int:
        raise wrong_type(param, "integer token ids", value)
    if not 0 <= value < limits.tokenizer_size:
        raise wrong(param, f"token ids from 0 to {limits.tokenizer_size - 1}", value)
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class TokenIds:
    """A set of token ids, in the order given."""

    max_items: int
    min_items: int = 0

    def check(self, param: str, value: Any, limits: Limits) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise wrong_type(param, "an array of token ids", value)
        if not self.min_items <= len(value) <= self.max_items:
            raise wrong(param, f"{self.min_items} to {self.max_items} token ids", value)
        return tuple(dict.fromkeys(token_id(param, item, limits) for item in value))

    def describe(self) -> dict[str, Any]:
        return {"type": "array", "items": "token id", "minItems": self.min_items, "maxItems": self.max_items}


@dataclasses.dataclass(frozen=True, slots=True)
class LogitBias:
    """{"token id": bias}, as pairs in ascending order of the id."""

    MAX_ITEMS: ClassVar[int] = 1024
    BIAS: ClassVar[Float] = Float(-100, 100)

    def check(self, param: str, value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object of token ids and numbers", value)
        if len(value) > self.MAX_ITEMS:
            raise wrong(param, f"at most {self.MAX_ITEMS} entries", f"{len(value)} entries")
        pairs = []
        for key, bias in value.items():
            if not _TOKEN_ID.fullmatch(key):
                raise wrong(param, "keys that are decimal token ids", key)
            pairs.append((token_id(param, int(key), limits), self.BIAS.check(param, bias, limits)))
        return tuple(sorted(pairs))

    def describe(self) -> dict[str, Any]:
        return {"type": "object", "maxProperties": self.MAX_ITEMS, "values": self.BIAS.describe()}


@dataclasses.dataclass(frozen=True, slots=True)
class StreamOptions:
    """{"include_usage", "continuous_usage_stats"}: which of the two are on."""

    HONOURED: ClassVar[tuple[str, ...]] = ("include_usage", "continuous_usage_stats")

    def check(self, param: str, value: Any, limits: Limits) -> frozenset[str]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object", value)
        chosen = set()
        for name, item in value.items():
            inner = f"{param}.{name[:64]}"
            is_known = name in self.HONOURED or name == "include_obfuscation"
            if not is_known:
                raise UnsupportedParameter(f"Unsupported parameter: '{inner}'.", param=inner)
            if item is None or not Bool().check(inner, item, limits):
                continue
            if name not in self.HONOURED:
                raise UnsupportedParameter(f"Unsupported value: '{inner}' is only supported as false.", param=inner)
            chosen.add(name)
        return frozenset(chosen)

    def describe(self) -> dict[str, Any]:
        return {"type": "object", "properties": list(self.HONOURED)}


@dataclasses.dataclass(frozen=True, slots=True)
class TemplateKwargs:
    """Switches of the model's chat template."""

    NAMES: ClassVar[tuple[str, ...]] = ("enable_thinking", "thinking")

    def check(self, param: str, value: Any, limits: Limits) -> dict[str, bool]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object", value)
        for name, item in value.items():
            inner = f"{param}.{name[:64]}"
            if name not in self.NAMES:
                raise UnsupportedParameter(f"Unsupported parameter: '{inner}'.", param=inner)
            Bool().check(inner, item, limits)
        return dict(value)

    def describe(self) -> dict[str, Any]:
        return {"type": "object", "properties": list(self.NAMES)}


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    """OpenAI's metadata: up to 16 pairs of strings. It carries no behaviour."""

    MAX_ITEMS: ClassVar[int] = 16

    def check(self, param: str, value: Any, limits: Limits) -> dict[str, str]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object of strings", value)
        if len(value) > self.MAX_ITEMS:
            raise wrong(param, f"at most {self.MAX_ITEMS} pairs", f"{len(value)} pairs")
        return {text(param, key, 64): text(param, item, 512) for key, item in value.items()}

    def describe(self) -> dict[str, Any]:
        return {"type": "object", "maxProperties": self.MAX_ITEMS}


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
    """Checked by a parser of its own (see bodies.py): prompt and messages."""

    type: tuple[str, ...]

    def check(self, param: str, value: Any, limits: Limits) -> Any:
        return value

    def describe(self) -> dict[str, Any]:
        return {"type": list(self.type)}


def is_same(value: object, neutral: object) -> bool:
    """Equality of JSON values: true is not 1, 1 is 1.0."""
    if isinstance(value, NotJson) or isinstance(value, bool) is not isinstance(neutral, bool):
        return False
    return value == neutral
