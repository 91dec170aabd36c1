"""Amounts as people write them: 80GB, 3.0TB/s, 798T."""

from __future__ import annotations

import re

from serving.parsing import parse_bytes

_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)\s*(?:flops?|flop/s|ops?|op/s)?\s*", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """ "80GB" or "512MiB", as bytes. Raises ValueError."""
    found = parse_bytes(text)
    if not found:
        raise ValueError("must be above 0")
    return found


def parse_bandwidth(text: str) -> float:
    """ "3.0TB/s", "900GB/s" or a plain number, as bytes per second. Raises ValueError."""
    amount, _, per = text.strip().partition("/")
    if per not in ("", "s"):
        raise ValueError("expected bytes per second such as 3.0TB/s")
    try:
        found = parse_bytes(amount)
    except ValueError:
        raise ValueError("expected bytes per second such as 3.0TB/s") from None
    if not found:
        raise ValueError("must be above 0")
    return float(found)


def parse_rate(text: str) -> float:
    """ "798T", "798TFLOPS" or "1.2P", as operations per second. Raises ValueError."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError("expected operations per second such as 798T")
    found = float(match.group(1)) * _FACTORS[match.group(2).lower()]
    if not found:
        raise ValueError("must be above 0")
    return found


def shown_bytes(count: float) -> str:
    """In decimal units, as vendors count memory."""
    return _shown(count, "B")


def shown_bandwidth(rate: float) -> str:
    return _shown(rate, "B/s")


def shown_rate(rate: float) -> str:
    return _shown(rate, "FLOP/s")


def _shown(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}"
