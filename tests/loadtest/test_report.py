"""The report: text stays text, the same run gives the same bytes, and what is plotted is what was measured."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from loadtest.compare import compare
from loadtest.goodput import Objective
from loadtest.knee import Knee, SearchSettings, find_knee
from loadtest.record import Chapter, Comparison
from loadtest.report import compare_report, figure, plots, run_report, svg, tables, words
from loadtest.summary import Summary, summarize
from loadtest.table import Recorded
from tests.loadtest.records import make_run, make_seen, make_stream_of_requests, run_through

OBJECTIVE = Objective(ttft_s=0.15, itl_s=0.05)
HOSTILE = "<script>alert('x')</script>\"'&]]>[red]{{7*7}}\x00\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checked(html.parser.HTMLParser):
    """Reads a page and refuses elements that are not closed, attributes that act, and anything from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.num: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert set(self.links) <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "link", "img", "base", "form")
        self.num[tag] = self.num.get(tag, 0) + 1
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "srcset", "style", "xlink:href")
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                assert value and value.startswith("#"), value
                self.links.append(value[1:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(run: Recorded, objective: Objective = OBJECTIVE) -> str:
    return run_report.html(summarize(run, objective), plots.of_run(run, objective))


def make_knee() -> Knee:
    def serve(rate: float) -> Summary:
        arrivals = np.arange(40) / rate
        return run_through(arrivals, np.full(40, 0.01 * rate), Objective(ttft_s=0.1), is_valid=rate < 15)

    return find_knee(serve, SearchSettings(), sleep=lambda seconds: None)


def hostile_run() -> Recorded:
    seen = [
        make_seen(i, float(i), [0.1, 0.2], label=HOSTILE + str(i % 3), tenant=HOSTILE + str(i % 2), endpoint=HOSTILE)
        for i in range(10)
    ]
    seen.append(make_seen(10, 11.0, error=HOSTILE, error_detail=HOSTILE, label=HOSTILE))
    return make_run(
        seen,
        comparisons=[Comparison(id=0, is_equal=False, difference=HOSTILE)],
        more=[Chapter(name=HOSTILE, at_s=2.0)],
        model=HOSTILE,
        target=HOSTILE,
        workload={HOSTILE: [HOSTILE]},
        labels={HOSTILE: HOSTILE},
        server={HOSTILE: {HOSTILE: 1}},
        started_wall_s=1e300,
    )


def test_hostile_strings_are_text_on_every_page() -> None:
    run = hostile_run()
    pages = [page_of(run), compare_report.html(run, run, compare(run, run, OBJECTIVE))]
    for text in pages:
        checked = Checked(text)
        assert "<script" not in text
        assert any("<script>alert('x')</script>" in piece for piece in checked.texts)
        assert "\x00" not in text and "\u202e" not in text


def test_hostile_strings_are_text_on_a_terminal() -> None:
    run = hostile_run()
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    run_report.show(summarize(run, OBJECTIVE), console)
    compare_report.show(compare(run, run, OBJECTIVE), console)
    assert "[red]" in out.getvalue()  # shown, not obeyed
    assert "\x00" not in out.getvalue() and "\u202e" not in out.getvalue()
    hostile = make_run([make_seen(0, 0.0, error="\x1b]0;owned\x07\x1b[2J")])
    out = io.StringIO()
    run_report.show(summarize(hostile, OBJECTIVE), Console(file=out, width=200))
    assert "\x1b" not in out.getvalue() and "owned" in out.getvalue()


def test_the_page_needs_nothing_but_itself_and_no_script() -> None:
    text = page_of(make_stream_of_requests(200))
    checked = Checked(text)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://(?!127\.0\.0\.1:8000)", text)
    assert checked.num["svg"] == 10 and checked.num["details"] == 10
    assert checked.num["h1"] == 1
    assert "prefers-color-scheme:dark" in text and "@media print" in text


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_stream_of_requests(100)
    knee = make_knee()
    written = [run_report.write_report(run, OBJECTIVE, tmp_path / name, knee) for name in ("first", "second")]
    for paths in zip(*([report.html_path, report.json_path, report.png_path] for report in written), strict=True):
        assert paths[0] is not None and paths[1] is not None
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_json_holds_the_summary_under_stable_names() -> None:
    run = make_run([make_seen(i, float(i), [0.1, 0.12, 0.2]) for i in range(10)])
    content = json.loads(run_report.json_bytes(summarize(run, OBJECTIVE), make_knee()))
    summary = content["summary"]
    assert summary["summary_version"] == 1 and summary["is_valid"] is True
    assert summary["objective"] == {"ttft_s": 0.15, "itl_s": 0.05, "itl_percentile": 99.0, "e2e_s": None}
    whole = summary["all"]
    assert whole["ttft_s"] == {
        "count": 10,
        **dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"), pytest.approx(0.1)),
    }
    assert whole["queue_wait_s"]["p50"] is None  # what was not measured is null, never 0
    assert {"goodput_per_s", "goodput_share", "output_tokens_per_s", "itl_s", "max_gap_s", "tpot_s"} < whole.keys()
    knee = content["knee"]
    assert knee["reason"] in ("found", "generator") and knee["rate_per_s"] > 0
    assert knee["trials"][0].keys() == {"rate_per_s", "has_held", "summary"}


@pytest.mark.parametrize("num", [0, 1, 2])
def test_reports_of_next_to_nothing(tmp_path: Path, num: int) -> None:
    run = make_run([make_seen(i, float(i), [0.1] * i) for i in range(num)])
    written = run_report.write_report(run, OBJECTIVE, tmp_path)
    Checked(written.html_path.read_text())
    assert (written.png_path is None) == (num == 0)
    out = io.StringIO()
    run_report.show(summarize(run, OBJECTIVE), Console(file=out, width=120))
    assert "Counts" in out.getvalue()


def test_runs_in_which_everything_fails_or_happens_at_once_are_drawn() -> None:
    failing = make_run([make_seen(i, float(i), error="refused") for i in range(5)])
    at_once = make_run([make_seen(i, 0.0, [0.0, 0.0]) for i in range(5)])
    for run in (failing, at_once):
        assert "NaN" not in page_of(run) and "nan" not in re.sub(r"<style>.*</style>", "", page_of(run))


def test_the_verdict_comes_first() -> None:
    seen = [make_seen(0, 0.0, [0.1])]
    assert "The generator kept up" in page_of(make_run(seen))
    assert "the generator lagged" in page_of(make_run(seen, is_valid=False))
    wrong = make_run(seen, comparisons=[Comparison(id=0, is_equal=False, difference="text")])
    assert "1 of 1 requests sent again alone were answered otherwise" in page_of(wrong)


def test_the_knee_is_drawn_and_told() -> None:
    knee = make_knee()
    named = plots.of_knee(knee)
    assert [name for name, _ in named] == ["knee-goodput", "knee-throughput", "knee-ttft", "knee-itl"]
    rates = named[0][1].series[0].x
    assert list(rates) == sorted(rates)
    run = make_run([make_seen(0, 0.0, [0.1])])
    text = run_report.html(summarize(run, OBJECTIVE), [], knee, named)
    Checked(text)
    assert "kept 99 % of the requests within the objective" in text
    assert text.count(">held<") == sum(trial.has_held for trial in knee.trials)
    nothing = Knee(0.0, 1.0, "min_rate", SearchSettings(), ())
    assert plots.of_knee(nothing) == [] and "No rate tried" in tables.knee_words(nothing)


def test_a_plot_puts_values_where_they_belong() -> None:
    plot = figure.Figure(
        "t",
        figure.Axis("x", 0.0, 10.0),
        figure.Axis("y", 1.0, 100.0, is_log=True),
        (figure.Series("s", np.array([0.0, 5.0, 10.0]), np.array([1.0, 10.0, 100.0]), "blue"),),
    )
    line = next(
        mark for mark in plot.marks() if isinstance(mark, figure.Line) and mark.tone == "blue" and len(mark.points) > 2
    )
    right, bottom = figure.WIDTH - figure.RIGHT, figure.HEIGHT - figure.BOTTOM
    middle = ((figure.LEFT + right) / 2, (figure.TOP + bottom) / 2)
    assert np.array(line.points) == pytest.approx(np.array([(figure.LEFT, bottom), middle, (right, figure.TOP)]))


def test_a_gap_in_the_values_is_a_gap_in_the_line() -> None:
    values = np.array([1.0, 2.0, np.nan, 3.0, np.nan])
    plot = figure.Figure(
        "t",
        figure.Axis("x", 0.0, 4.0),
        figure.fitted("y", [values]),
        (figure.Series("s", np.arange(5.0), values, "purple"),),
    )
    drawn = [mark for mark in plot.marks() if getattr(mark, "tone", "") == "purple"]
    assert [type(mark) for mark in drawn if not (isinstance(mark, figure.Line) and mark.width > 2)] == [
        figure.Line,
        figure.Dot,
    ]
    assert "nan" not in svg.drawn(plot, "x")


@pytest.mark.parametrize(
    ("low", "high", "is_log"),
    [(0, 1, False), (0, 3e-5, False), (0.3, 0.31, True), (1e-6, 1e4, True), (0.016, 0.045, True), (7, 7e5, True)],
)
def test_axes_have_a_few_ticks_within_their_ends(low: float, high: float, is_log: bool) -> None:
    ticks = figure.Axis("", low, high, is_log).ticks()
    assert 2 <= len(ticks) <= 13 and all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("say", "value", "text"),
    [
        (words.duration, 0.01234, "12.3 ms"),
        (words.duration, 0.9996, "1.00 s"),
        (words.duration, 0.0, "0 ms"),
        (words.duration, 3.2e-5, "32.0 µs"),
        (words.duration, 600.0, "10.0 min"),
        (words.duration, float("nan"), "–"),
        (words.tick, 0.05, "50 ms"),
        (words.tick, 100.0, "100 s"),
        (words.number, 9999, "9999"),
        (words.number, 1234567, "1.23 M"),
        (words.number, 999_999, "1.00 M"),
        (words.share, 0.99999, ">99.99 %"),
        (words.share, 1.0, "100 %"),
        (words.share, 1e-6, "<0.01 %"),
        (words.share, 0.0, "0 %"),
        (words.change, 0.05, "+5.0 %"),
    ],
)
def test_numbers_in_words(say: Any, value: float, text: str) -> None:
    assert say(value) == text


def test_png_shows_the_figures(tmp_path: Path) -> None:
    written = run_report.write_report(make_stream_of_requests(100), OBJECTIVE, tmp_path)
    assert written.png_path is not None
    with Image.open(written.png_path) as image:
        assert image.format == "PNG" and image.width > 1000 and image.height > 800
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert written.png_path.stat().st_size < 300_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    """A real one renders it: the policy lets the page's own colours through, and scripts would not run."""
    written = run_report.write_report(make_stream_of_requests(150), OBJECTIVE, tmp_path / "report")
    shot = tmp_path / "shot.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,2200"]
    subprocess.run(
        [
            "chromium",
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={shot}",
            written.html_path.as_uri(),
        ],
        check=True,
        timeout=120,
        capture_output=True,
    )
    with Image.open(shot) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert (0x24, 0x63, 0xB4) in colours and (0x1A, 0x7F, 0x4B) in colours  # lines in blue and green
