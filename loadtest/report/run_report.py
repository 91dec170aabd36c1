"""The report of a run: HTML, PNG, JSON, and tables on a terminal."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich import box, markup
from rich.console import Console
from rich.table import Table as RichTable

from loadtest.goodput import Objective
from loadtest.knee import REASONS, Knee
from loadtest.report import page, plots, tables, words
from loadtest.report.figure import Figure
from loadtest.report.tables import Sheet
from loadtest.summary import Summary, summarize
from loadtest.table import Recorded

_COUNTED = (
    "Latencies count from the time at which a request was meant to be sent, whether or not the generator got round to "
    "it then, so a server that stalls cannot hide the requests that had to wait. Percentiles are by nearest rank, of "
    "requests that succeeded; goodput counts all that were offered. Rates divide by the time from the first intended "
    "send to the last end. An inter-token gap lies between two reads that brought output."
)
_ONE_OF_THESE = "<p>Everything else on this page is of one of these runs: the one at the highest rate that held.</p>"
_PNG_FIGURES = (
    *("requests-over-time", "in-flight-over-time"),
    *("ttft-over-time", "itl-over-time"),
    *("ttft-distribution", "itl-distribution"),
)


@dataclasses.dataclass(frozen=True)
class Written:
    """Where the report of a run lies. `png_path` is None for a run without requests: there is nothing to plot."""

    html_path: Path
    json_path: Path
    png_path: Path | None


def write_report(run: Recorded, objective: Objective, folder: Path, knee: Knee | None = None) -> Written:
    """Write report.html, report.json and report.png into `folder`, which is made. Raises OSError.

    With a `knee`, the figures and runs of its search come first; `run` is then the one that stands for it.
    """
    from loadtest.report import png  # Pillow, only where a picture is made

    summary = summarize(run, objective)
    folder.mkdir(parents=True, exist_ok=True)
    named = plots.of_run(run, objective)
    knee_named = plots.of_knee(knee) if knee else []
    written = Written(folder / "report.html", folder / "report.json", folder / "report.png" if named else None)
    written.html_path.write_text(html(summary, named, knee, knee_named), encoding="utf-8")
    written.json_path.write_bytes(json_bytes(summary, knee))
    if written.png_path:
        shown = [figure for name, figure in (*knee_named[:2], *named) if knee_named or name in _PNG_FIGURES]
        outcome = _outcome(summary) if knee is None else f"knee {words.rate(knee.rate)}"
        written.png_path.write_bytes(png.drawn(f"{_title(summary)} · {outcome}", shown[:6]))
    return written


def html(
    summary: Summary,
    named: list[tuple[str, Figure]],
    knee: Knee | None = None,
    knee_named: list[tuple[str, Figure]] | None = None,
) -> str:
    """The page: a function of its arguments alone, so that the same run gives the same bytes."""
    sections: list[tuple[str, str]] = []
    if knee is not None:
        sections.append(("Knee", page.figures(knee_named or []) + page.table(tables.knee_sheet(knee)) + _ONE_OF_THESE))
    by_title = {sheet.title: sheet for sheet in tables.sheets(summary)}
    counts = by_title.pop("Counts")
    if "Latencies" in by_title:
        sections.append(("Latencies", page.table(by_title.pop("Latencies"))))
    split = [(name, figure) for name, figure in named if not name.endswith("-distribution")]
    if split:
        sections.append(("Over time", page.figures(split)))
        sections.append(("Distributions", page.figures(named[len(split) :])))
    sections += [(title, page.table(sheet)) for title, sheet in by_title.items()]
    sections.append(("Counts", page.table(counts, has_words=True)))
    sections.append(("Settings", page.table(tables.settings(summary), has_words=True)))
    lead = _banner(summary) + page.tiles(tables.headline(summary))
    subtitle = f"{summary.header.target} · {_when(summary)} · objective: {summary.objective.words()}"
    return page.page(_title(summary), subtitle, sections, lead, f"<p>{_COUNTED}</p>")


def json_bytes(summary: Summary, knee: Knee | None = None) -> bytes:
    """`{"summary": …, "knee": …}`, indented; NaN and infinity are null."""
    content: dict[str, Any] = {"summary": summary}
    if knee is not None:
        content["knee"] = knee_content(knee)
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def knee_content(knee: Knee) -> dict[str, Any]:
    """The search as JSON: trials in the order in which they ran."""
    return {
        "rate_per_s": knee.rate,
        "broken_at_per_s": knee.broken_at,
        "reason": knee.reason,
        "reason_words": REASONS[knee.reason],
        "settings": dataclasses.asdict(knee.settings),
        "trials": [
            {"rate_per_s": trial.rate, "has_held": trial.has_held, "summary": trial.summary} for trial in knee.trials
        ],
    }


def show(summary: Summary, console: Console, knee: Knee | None = None) -> None:
    """The tables on a terminal."""
    console.print(f"[bold]{said(_title(summary))}[/]  {said(summary.header.target)}")
    console.print(f"objective: {said(summary.objective.words())}")
    if knee is not None:
        show_sheet(tables.knee_sheet(knee), console)
    for sheet in tables.sheets(summary):
        show_sheet(sheet, console)
    figures = "  ".join(f"{what} [bold]{said(value)}[/]" for what, value, _ in tables.headline(summary))
    console.print(figures, highlight=False)
    if summary.is_valid:
        console.print("[green]valid[/]: the generator kept up")
    for reason in summary.reasons:
        console.print(f"[red]INVALID[/]: {said(reason)}", highlight=False)


def said(text: str) -> str:
    """Plain text as rich's markup, which shows it as it is."""
    return markup.escape(words.plain(text))


def show_sheet(sheet: Sheet, console: Console) -> None:
    tones = {"better": "green", "held": "green", "worse": "red", "broke": "red", "invalid": "red", "unclear": "yellow"}
    shown = RichTable(title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    kept = _kept_columns(sheet, console.width)
    for index in kept:
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        shown.add_column(
            said(sheet.columns[index]), justify=justify, overflow="fold", no_wrap=0 < index < len(kept) - 1
        )
    for row in sheet.rows:
        cells = (row[index] for index in kept)
        shown.add_row(*(f"[{tones[cell]}]{cell}[/]" if cell in tones else said(cell) for cell in cells))
    console.print(shown)
    if sheet.note:
        console.print(f"[dim]{said(sheet.note)}[/]")


def _kept_columns(sheet: Sheet, width: int) -> list[int]:
    """Columns that fit, without as many of the minor ones as it takes."""
    gap = 3
    widths = [max(map(len, column)) + gap for column in zip(sheet.columns, *sheet.rows, strict=True)]
    kept = list(range(len(widths)))
    for name in sheet.minor:
        if sum(widths[index] for index in kept) <= width:
            break
        kept.remove(sheet.columns.index(name))
    return kept


def _banner(summary: Summary) -> str:
    if not summary.is_valid:
        return page.banner(False, "Invalid.", "These figures are not the server's:", summary.reasons)
    wrong = summary.correctness.num_compared - summary.correctness.num_equal
    if wrong:
        text = f"{wrong} of {summary.correctness.num_compared} requests sent again alone were answered otherwise."
        return page.banner(False, "Wrong answers.", text)
    return page.banner(True, "Valid.", f"The generator kept up. {_compared(summary)}")


def _compared(summary: Summary) -> str:
    count = summary.correctness.num_compared
    if not count:
        return "No request was sent again to compare its answer."
    return f"{words.number(count)} requests sent again alone had the same text and logprobs."


def _title(summary: Summary) -> str:
    return f"Load test of {summary.header.model or 'a model'}"


def _outcome(summary: Summary) -> str:
    if not summary.is_valid:
        return "INVALID RUN"
    group = summary.all
    return f"{words.rate(group.goodput_per_s)} within the objective ({words.share(group.goodput_share)})"


def _when(summary: Summary) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(summary.header.started_wall_s, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
