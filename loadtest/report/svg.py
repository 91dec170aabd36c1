"""Figures as inline SVG: colours come from the page, so that they follow its light or dark scheme."""

from __future__ import annotations

from loadtest.report.figure import HEIGHT, WIDTH, Area, Dot, Figure, Hover, Line, Mark, Text
from loadtest.report.words import escape


def drawn(figure: Figure, name: str) -> str:
    """One `<svg>` element. `name` is its id on the page: unique there, letters and dashes."""
    inside = "".join(_element(mark) for mark in figure.marks())
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-note">'
        f'<title id="{name}-title">{escape(figure.title)}</title><desc id="{name}-note">{escape(figure.note)}</desc>'
        f"{inside}</svg>"
    )


def _element(mark: Mark) -> str:
    match mark:
        case Line():
            dash = ' stroke-dasharray="5 4"' if mark.is_dashed else ""
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
            return f'<polyline class="l {mark.tone}" stroke-width="{mark.width:g}"{dash} points="{points}"/>'
        case Area():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
            return f'<polygon class="a {mark.tone}" points="{points}"/>'
        case Dot():
            kind = "o" if mark.is_hollow else "d"
            return f'<circle class="{kind} {mark.tone}" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="3.5"/>'
        case Text():
            turn = f' transform="rotate(-90 {mark.x:.1f} {mark.y:.1f})"' if mark.is_vertical else ""
            tones = f"{mark.tone} halo" if mark.has_halo else mark.tone
            return (
                f'<text class="t {tones}" x="{mark.x:.1f}" y="{mark.y:.1f}" text-anchor="{mark.anchor}"{turn}>'
                f"{escape(mark.text)}</text>"
            )
        case Hover():
            return (
                f'<rect class="h" x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" '
                f'height="{mark.height:.1f}"><title>{escape(mark.text)}</title></rect>'
            )
