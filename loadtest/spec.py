"""Small texts of the command line: `kind:value` and `kind:name=value,name=value`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


class SpecError(ValueError):
    """A text that cannot be what it is given for; the message says what may stand there."""


def parse(text: str, kinds: Mapping[str, Collection[str]], what: str) -> tuple[str, dict[str, str]]:
    """Kind and named values of `text`. kinds: names that each kind knows, the first being that of a bare value.

    Raises SpecError naming `what`.
    """
    kind, _, rest = text.partition(":")
    if kind not in kinds:
        raise SpecError(f"{what}: {kind!r} is none of {', '.join(kinds)}")
    names = list(kinds[kind])
    values: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        name, equals, value = part.partition("=")
        if not equals:
            name, value = names[0] if names and not values else "", part
        if name not in names:
            raise SpecError(f"{what}: {kind} takes {', '.join(names) or 'nothing'}, got {part!r}")
        values[name] = value
    return kind, values


def number(values: dict[str, str], name: str, default: float | None, what: str, *, above: float = -math.inf) -> float:
    """A finite number. Raises SpecError when it is none, missing, or not above `above`."""
    if name not in values:
        if default is None:
            raise SpecError(f"{what}: {name} is missing")
        return default
    return positive(values[name], f"{what}: {name}", above)


def positive(text: str, what: str, above: float = 0.0) -> float:
    """A finite number above a bound. Raises SpecError."""
    try:
        value = float(text)
    except ValueError:
        raise SpecError(f"{what} must be a number, got {text!r}") from None
    if not math.isfinite(value) or value <= above:
        raise SpecError(f"{what} must be {'finite' if above == -math.inf else f'above {above:g}'}, got {text}")
    return value
