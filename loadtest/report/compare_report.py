"""The report of a comparison: HTML, JSON, and a table on a terminal."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from loadtest.compare import Change, RunComparison
from loadtest.report import page, words
from loadtest.report.figure import Axis, Figure, Rule, Series, fitted
from loadtest.report.plots import MIN_SHOWN_S
from loadtest.report.run_report import said, show_sheet
from loadtest.report.tables import Sheet, settings
from loadtest.summary import Summary
from loadtest.table import Floats, Recorded

NAMES = {
    "goodput_share": "Goodput, share",
    "error_share": "Errors, share",
    "goodput_per_s": "Goodput, requests",
    "output_tokens_per_s": "Output tokens",
    "unequal_share": "Unequal answers",
}
_KINDS = {"ttft": "TTFT", "itl": "ITL", "max_gap": "Longest gap", "tpot": "TPOT", "e2e": "End to end"}


@dataclasses.dataclass(frozen=True)
class WrittenComparison:
    html_path: Path
    json_path: Path


def write_comparison(a: Recorded, b: Recorded, comparison: RunComparison, folder: Path) -> WrittenComparison:
    """Write compare.html and compare.json into `folder`, which is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = WrittenComparison(folder / "compare.html", folder / "compare.json")
    written.html_path.write_text(html(a, b, comparison), encoding="utf-8")
    written.json_path.write_bytes(json_bytes(comparison))
    return written


def json_bytes(comparison: RunComparison) -> bytes:
    """The comparison, indented; NaN is null."""
    content = {"exit_code": comparison.exit_code, **msgspec.to_builtins(comparison)}
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def html(a: Recorded, b: Recorded, comparison: RunComparison) -> str:
    """The page: a function of its arguments alone."""
    sections = [("Changes", page.table(changes_sheet(comparison)))]
    figures = distributions(a, b, comparison)
    if figures:
        sections.append(("Distributions", page.figures(figures)))
    sections.append(("Settings", page.table(_settings(comparison.a, comparison.b), has_words=True)))
    text, points = outcome(comparison), [*comparison.invalid, *(f"differs: {text}" for text in comparison.differences)]
    word = {0: "B is no worse.", 1: "B is worse.", 3: "Invalid."}[comparison.exit_code]
    lead = page.banner(comparison.exit_code == 0, word, text, points)
    first, second = (run.header for run in (comparison.a, comparison.b))
    subtitle = f"A: {first.model} at {first.target} · B: {second.model} at {second.target}"
    return page.page("Comparison of two load tests", subtitle, sections, lead, f"<p>{_COUNTED}</p>")


_COUNTED = (
    "Intervals: a seeded bootstrap over blocks of consecutive requests of these two runs. They do not know how much "
    "two runs of one server differ from day to day: repeat runs before believing a small change."
)


def changes_sheet(comparison: RunComparison) -> Sheet:
    rows = tuple(
        (
            name_of(change.metric),
            _value(change, change.a),
            _value(change, change.b),
            _delta(change, change.change),
            _interval(change),
            change.verdict,
        )
        for change in comparison.changes
    )
    return Sheet(
        "Changes",
        ("", "A", "B", "change", f"{words.share(comparison.confidence)} interval", "verdict"),
        rows,
        f"Counted from {words.share(comparison.threshold)}, for shares from "
        f"{words.digits(comparison.share_threshold * 100)} points; objective: {comparison.b.objective.words()}.",
    )


def outcome(comparison: RunComparison) -> str:
    """In a sentence."""
    if comparison.invalid:
        return "A run is not to be trusted, so nothing follows from the figures."
    named = {
        verdict: [name_of(change.metric) for change in comparison.changes if change.verdict == verdict]
        for verdict in ("worse", "better", "unclear")
    }
    parts = [f"{verdict}: {', '.join(names)}" for verdict, names in named.items() if names]
    return f"{'; '.join(parts) or 'all the same'}."


def show(comparison: RunComparison, console: Console) -> None:
    """The table and the outcome on a terminal."""
    show_sheet(changes_sheet(comparison), console)
    for text in comparison.differences:
        console.print(f"[yellow]differs[/] {said(text)}", highlight=False)
    for reason in comparison.invalid:
        console.print(f"[red]INVALID[/] {said(reason)}", highlight=False)
    console.print(said(outcome(comparison)), highlight=False)


def name_of(metric: str) -> str:
    """`ttft_p99_s` -> `TTFT p99`."""
    if metric in NAMES:
        return NAMES[metric]
    kind, percentile, _ = metric.rsplit("_", 2)
    return f"{_KINDS[kind]} {percentile}"


def distributions(a: Recorded, b: Recorded, comparison: RunComparison) -> list[tuple[str, Figure]]:
    """Cumulated distributions of A and B over each other, where both have values."""
    objective = comparison.a.objective
    limits = {"ttft": objective.ttft_s, "itl": objective.itl_s, "e2e": objective.e2e_s, "tpot": None}
    found = []
    for kind, limit in limits.items():
        rows = [np.sort(np.maximum(values, MIN_SHOWN_S)) for values in (_values(run, kind) for run in (a, b))]
        if not all(map(len, rows)):
            continue
        marks = [] if limit is None else [np.array([limit])]
        axis = fitted(_KINDS[kind], [*rows, *marks], words.tick, is_log=True)
        edges = np.geomspace(axis.low, axis.high, 121)
        figure = Figure(
            _KINDS[kind],
            axis,
            Axis("share at or below", 0.0, 1.04, say=words.share),
            tuple(
                Series(name, edges, np.searchsorted(row, edges, side="right") / len(row), tone, is_dashed=name == "A")
                for name, row, tone in zip("AB", rows, ("orange", "blue"), strict=True)
            ),
            () if limit is None else (Rule(limit, f"objective {words.tick(limit)}", True),),
            note="The further left and up, the faster. The axis is logarithmic; 10 µs stands for less.",
        )
        found.append((f"{kind}-compared", figure))
    return found


def _values(run: Recorded, kind: str) -> Floats:
    table = run.table
    values: Floats = table.gap_s[table.is_ok[table.gap_owner]] if kind == "itl" else getattr(table, f"{kind}_s")
    return values[~np.isnan(values)]


def _settings(a: Summary, b: Summary) -> Sheet:
    first, second = ({row[0]: row[1] for row in settings(summary).rows} for summary in (a, b))
    names = list(dict.fromkeys((*first, *second)))
    rows = tuple((name, first.get(name, words.NOTHING), second.get(name, words.NOTHING)) for name in names)
    return Sheet("Settings", ("", "A", "B"), rows)


def _value(change: Change, value: float) -> str:
    return {"s": words.duration, "1/s": words.rate, "share": words.share}[change.unit](value)


def _interval(change: Change) -> str:
    if math.isnan(change.low):
        return words.NOTHING
    unit = "points" if change.unit == "share" else "%"
    return f"{change.low * 100:+.1f} … {change.high * 100:+.1f} {unit}"


def _delta(change: Change, value: float) -> str:
    if change.unit != "share":
        return words.change(value)
    return words.NOTHING if math.isnan(value) else f"{value * 100:+.2f} points"
