"""Pages of HTML that need nothing but themselves: no script, no font, no image from elsewhere.

Everything that a server, a data set or a person named is text here: `escape` stands between it and the page, and a
content security policy behind that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from loadtest.report import svg
from loadtest.report.figure import Figure
from loadtest.report.style import RULES
from loadtest.report.tables import Sheet
from loadtest.report.tones import DARK, LIGHT, variables
from loadtest.report.words import escape

MAX_ROWS = 200
VERDICTS = ("better", "worse", "same", "unclear", "held", "broke", "invalid")


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]], lead: str = "", footer: str = "") -> str:
    """A whole document. `sections` are (heading, HTML), `lead` and `footer` are HTML; the rest is text."""
    links = "".join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name, _ in sections)
    body = "".join(
        f'<section id="{_anchor(name)}" aria-labelledby="{_anchor(name)}-h">'
        f'<h2 id="{_anchor(name)}-h">{escape(name)}</h2>{html}</section>'
        for name, html in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_style()}</style></head><body>"
        f'<a class="skip" href="#{_anchor(sections[0][0])}">Skip to the figures</a>'
        f'<header><h1>{escape(title)}</h1><p class="muted">{escape(subtitle)}</p>{lead}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{body}</main><footer>{footer}</footer></body></html>\n"
    )


def banner(is_good: bool, word: str, text: str, points: Iterable[str] = ()) -> str:
    """The verdict above everything else."""
    points = "".join(f"<li>{escape(point)}</li>" for point in points)
    return (
        f'<div class="banner{"" if is_good else " bad"}" role="status"><strong>{escape(word)}</strong> {escape(text)}'
        f"{f'<ul>{points}</ul>' if points else ''}</div>"
    )


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """(what, figure, remark) as boxes."""
    boxes = (
        f'<div><dt>{escape(what)}</dt><dd class="figure">{escape(figure)}</dd><dd>{escape(remark)}</dd></div>'
        for what, figure, remark in rows
    )
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def table(sheet: Sheet, *, has_words: bool = False) -> str:
    """A sheet; `has_words`: its cells are text rather than figures."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in sheet.rows
    )
    kind = ' class="words"' if has_words else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(sheet.title)}"><table{kind}>'
        f"<caption>{escape(sheet.note)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def figures(named: Iterable[tuple[str, Figure]]) -> str:
    """Plots in a grid, each with its numbers folded away below it."""
    return f'<div class="figures">{"".join(_figure(name, figure) for name, figure in named)}</div>'


def _figure(name: str, figure: Figure) -> str:
    shown = [series for series in figure.series if series.name]
    rows = []
    if shown:
        step = -(-len(shown[0].x) // MAX_ROWS)
        xs = shown[0].x[::step]
        columns = [series.y[::step] for series in shown]
        rows = [
            (figure.x.say(float(x)), *(figure.y.say(float(column[index])) for column in columns))
            for index, x in enumerate(xs)
        ]
    sheet = Sheet(f"{figure.title}: numbers", (figure.x.label, *(series.name for series in shown)), tuple(rows))
    return (
        f"<figure><h3>{escape(figure.title)}</h3>{svg.drawn(figure, name)}"
        f'<figcaption class="note">{escape(figure.note)}</figcaption>'
        f"<details><summary>Numbers</summary>{table(sheet)}</details></figure>"
    )


def _cell(text: str) -> str:
    return f'<td class="{text}">{text}</td>' if text in VERDICTS else f"<td>{escape(text)}</td>"


def _anchor(name: str) -> str:
    return "s-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())


@functools.cache
def _style() -> str:
    tones = "".join(f".l.{t},.o.{t}{{stroke:var(--{t})}}.a.{t},.d.{t},.t.{t}{{fill:var(--{t})}}" for t in LIGHT)
    return (
        f":root{{color-scheme:light dark;{variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}{tones}{RULES}"
    )
