"""Colours by what they are for, on a light and on a dark page."""

from __future__ import annotations

LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1a1d23",
    "muted": "#5b6370",
    "grid": "#e3e6eb",
    "low": "#8fbcf0",  # three shades of one hue: a median, a high percentile, the tail
    "middle": "#3a80d9",
    "high": "#0b2d61",
    "blue": "#2463b4",
    "orange": "#b85c00",
    "green": "#1a7f4b",
    "purple": "#7546b8",
    "red": "#b8243c",
}
DARK = {
    "page": "#14171c",
    "panel": "#1c2027",
    "ink": "#e8eaee",
    "muted": "#9aa3b0",
    "grid": "#2c323b",
    "low": "#426fa6",
    "middle": "#5f9de6",
    "high": "#d6e8ff",
    "blue": "#6aa5ea",
    "orange": "#eb9a45",
    "green": "#55bd86",
    "purple": "#b08ce8",
    "red": "#f0707f",
}


def variables(tones: dict[str, str]) -> str:
    """CSS custom properties, `--ink:#…;`."""
    return "".join(f"--{name}:{colour};" for name, colour in tones.items())
