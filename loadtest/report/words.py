"""Numbers as people read them: three significant digits and the unit that fits."""

from __future__ import annotations

import html
import math
import unicodedata

NOTHING = "–"  # what was not measured


def plain(text: str) -> str:
    """Text that only shows: what steers a terminal, turns the direction of writing or is no character becomes `�`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(letter)[0] == "C" else letter for letter in text)


def escape(text: str) -> str:
    """Plain text as HTML, between tags or within quotes."""
    return html.escape(plain(text))


def duration(seconds: float) -> str:
    """`0.01234` -> `12.3 ms`."""
    if math.isnan(seconds):
        return NOTHING
    size = abs(seconds)
    if size >= 120:
        return f"{digits(seconds / 60)} min"
    if size >= 0.9995:
        return f"{digits(seconds)} s"
    if size >= 0.9995e-3:
        return f"{digits(seconds * 1e3)} ms"
    return "0 ms" if seconds == 0 else f"{digits(seconds * 1e6)} µs"


def tick(seconds: float) -> str:
    """A duration without trailing zeros, for axes: `0.05` -> `50 ms`."""
    return _bare(duration(seconds))


def plain_number(value: float) -> str:
    """A number without trailing zeros, for axes: `0.4`."""
    return _bare(number(value))


def _bare(text: str) -> str:
    amount, space, unit = text.partition(" ")
    return (amount.rstrip("0").rstrip(".") if "." in amount else amount) + space + unit


def number(value: float) -> str:
    """`1234567` -> `1.23 M`; whole numbers below 10,000 stay as they are."""
    if math.isnan(value):
        return NOTHING
    if abs(value) < 10_000:
        return str(int(value)) if value == int(value) else digits(value)
    for unit, size in (("k", 1e6), ("M", 1e9), ("G", 1e12)):
        if abs(value) < 0.9995 * size:
            return f"{digits(value / size * 1e3)} {unit}"
    return f"{value:.3g}"


def rate(per_second: float) -> str:
    return NOTHING if math.isnan(per_second) else f"{number(per_second)}/s"


def share(fraction: float) -> str:
    """`0.9987` -> `99.87 %`; never rounds a share below one up to 100 %, nor one above none down to 0 %."""
    if math.isnan(fraction):
        return NOTHING
    if 0 < fraction < 5e-5:
        return "<0.01 %"
    if 0.9999 < fraction < 1:
        return ">99.99 %"
    text = f"{fraction * 100:.2f}".rstrip("0").rstrip(".")
    return f"{text} %"


def change(fraction: float) -> str:
    """`0.05` -> `+5.0 %`."""
    if not math.isfinite(fraction):
        return NOTHING
    return f"{fraction * 100:+.1f} %"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{abs(value):.3g}")))))
    return f"{value:.{decimals}f}"
