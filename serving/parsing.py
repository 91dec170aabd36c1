"""Settings as text: sizes, numbers and yes or no."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

_UNITS: Final = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS: Final = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(text: str) -> int:
    """ "512MiB", "2GiB", "1.5G" or "1048576" as a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise ValueError("expected a size such as 512MiB or 2GiB")
    unit = match.group(2) or ""
    return int(float(match.group(1)) * (_BINARY_UNITS | _UNITS)[unit])


def parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def parser(key: str, annotation: str) -> Callable[[str], Any]:
    """What turns the text given for a setting into its type; raises ValueError that says what was expected."""
    if key.endswith("_bytes"):
        return parse_bytes
    return {"int": _parse_int, "float": _parse_float, "bool": parse_bool}.get(
        annotation.removesuffix(" | None"), str.strip
    )
