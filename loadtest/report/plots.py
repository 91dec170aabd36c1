"""The figures of a report: what is plotted against what."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from loadtest.goodput import Objective, within
from loadtest.knee import Knee
from loadtest.report import words
from loadtest.report.figure import Axis, Figure, Floats, Rule, Series, fitted
from loadtest.series import Series as OverTime
from loadtest.series import over_time
from loadtest.table import Recorded, Table

NUM_BINS = 80
MIN_SHOWN_S = 1e-5  # gaps within one read are 0 s, which a logarithmic axis has no place for
PERCENTILE_TONES = {50: "low", 90: "middle", 99: "high"}


def of_run(run: Recorded, objective: Objective) -> list[tuple[str, Figure]]:
    """(name, figure) for a run, in the order of the report; none for a run without requests."""
    if not len(run.table):
        return []
    seen = over_time(run.table, within(run.table, objective))
    chapters = tuple(
        Rule(chapter.at_s, chapter.name[:24], True, "muted") for chapter in itertools.islice(run.chapters, 12)
    )
    figures = [
        ("requests-over-time", _requests_over_time(seen, chapters)),
        (
            "ttft-over-time",
            _percentiles_over_time("Time to first token", seen, seen.ttft_s, objective.ttft_s, chapters),
        ),
        ("itl-over-time", _percentiles_over_time("Inter-token latency", seen, seen.itl_s, objective.itl_s, chapters)),
        ("e2e-over-time", _percentiles_over_time("End to end", seen, seen.e2e_s, objective.e2e_s, chapters)),
        ("tokens-over-time", _tokens_over_time(seen, chapters)),
        ("in-flight-over-time", _in_flight_over_time(seen, chapters)),
    ]
    return figures + [(name, figure) for name, figure in _distributions(run.table, objective) if figure.series]


def of_knee(knee: Knee) -> list[tuple[str, Figure]]:
    """(name, figure): goodput by rate, and latency against throughput. None without a valid run."""
    trials = knee.curve()
    if not trials:
        return []
    rates = np.array([trial.rate for trial in trials])
    shares = np.array([trial.summary.all.goodput_share for trial in trials])
    done = np.array([trial.summary.all.completed_per_s for trial in trials])
    good = np.array([trial.summary.all.goodput_per_s for trial in trials])
    rules = (Rule(knee.rate, f"knee {words.number(knee.rate)}/s", True, "green"),) if knee.rate else ()
    x = fitted("requests/s asked for", [rates], is_log=bool(rates.max() > 20 * rates.min()))
    ttft = {50: [t.summary.all.ttft_s.p50 for t in trials], 99: [t.summary.all.ttft_s.p99 for t in trials]}
    itl = {50: [t.summary.all.itl_s.p50 for t in trials], 99: [t.summary.all.itl_s.p99 for t in trials]}
    objective = trials[0].summary.objective
    return [
        (
            "knee-goodput",
            Figure(
                "Requests within the objective, by rate",
                x,
                Axis("share of requests", 0.0, 1.04, say=words.share),
                (Series("goodput share", rates, shares, "blue", "linked"),),
                (*rules, Rule(knee.settings.min_share, f"needed {words.share(knee.settings.min_share)}", False)),
                note="Each dot is a run. The knee is the highest rate whose runs keep the share that is needed.",
            ),
        ),
        (
            "knee-throughput",
            Figure(
                "Throughput by rate",
                x,
                fitted("requests/s", [done, good], is_log=False),
                (
                    Series("completed", rates, done, "low", "linked"),
                    Series("within the objective", rates, good, "green", "linked"),
                ),
                rules,
                note="Past the knee a server goes on completing requests, but too late: the green line falls away.",
            ),
        ),
        ("knee-ttft", _against_throughput("Time to first token", done, ttft, objective.ttft_s)),
        ("knee-itl", _against_throughput("Inter-token latency", done, itl, objective.itl_s)),
    ]


def _against_throughput(what: str, done: Floats, values: dict[int, list[float]], limit: float | None) -> Figure:
    columns = {percentile: np.array(column, dtype=np.float64) for percentile, column in values.items()}
    return Figure(
        f"{what} against throughput",
        fitted("requests/s completed", [done], is_log=False),
        fitted(what.lower(), [*columns.values(), *_limit(limit)], words.tick),
        tuple(
            Series(f"p{percentile}", done, column, PERCENTILE_TONES[percentile], "linked")
            for percentile, column in columns.items()
        ),
        _promise(limit),
        note="Runs in the order of their rates: where the line turns upwards, more load only brings more waiting.",
    )


def _percentiles_over_time(
    what: str, seen: OverTime, rows: dict[int, Floats], limit: float | None, chapters: tuple[Rule, ...]
) -> Figure:
    middles = seen.middles_s
    return Figure(
        f"{what} over time",
        _time_axis(seen),
        fitted(what.lower(), [*rows.values(), *_limit(limit)], words.tick),
        tuple(Series(f"p{name}", middles, row, PERCENTILE_TONES[name]) for name, row in rows.items()),
        (*chapters, *_promise(limit)),
        _hovers(seen, {f"p{name}": row for name, row in rows.items()}, words.duration),
        "Of the requests that were due, or the gaps that ended, in each slice of time.",
    )


def _requests_over_time(seen: OverTime, chapters: tuple[Rule, ...]) -> Figure:
    rows = {
        "offered": (seen.offered_per_s, "muted"),
        "completed": (seen.completed_per_s, "blue"),
        "within the objective": (seen.good_per_s, "green"),
        "failed": (seen.failed_per_s, "red"),
    }
    rows = {name: (row, tone) for name, (row, tone) in rows.items() if name != "failed" or row.any()}
    return _lines("Requests over time", "requests/s", rows, seen, chapters, "Completed trails offered by the latency.")


def _tokens_over_time(seen: OverTime, chapters: tuple[Rule, ...]) -> Figure:
    rows = {"output": (seen.output_tokens_per_s, "purple")}
    note = "Events with output as they arrived; one is a token unless the server puts several into one."
    return _lines("Output over time", "events/s", rows, seen, chapters, note)


def _in_flight_over_time(seen: OverTime, chapters: tuple[Rule, ...]) -> Figure:
    rows = {"waiting": (seen.num_waiting, "orange"), "running": (seen.num_running, "blue")}
    note = "Waiting: due, without a first token. Running: between first and last token."
    return _lines("Requests in flight", "requests", rows, seen, chapters, note)


def _lines(
    title: str, unit: str, rows: dict[str, tuple[Floats, str]], seen: OverTime, chapters: tuple[Rule, ...], note: str
) -> Figure:
    return Figure(
        title,
        _time_axis(seen),
        fitted(unit, [row for row, _ in rows.values()], is_log=False),
        tuple(Series(name, seen.middles_s, row, tone) for name, (row, tone) in rows.items()),
        chapters,
        _hovers(seen, {name: row for name, (row, _) in rows.items()}, words.number),
        note,
    )


def _distributions(table: Table, objective: Objective) -> list[tuple[str, Figure]]:
    is_ok = table.is_ok
    latencies: list[tuple[str, str, dict[str, Floats], float | None]] = [
        (
            "ttft",
            "Time to first token",
            {"from the intended send time": table.ttft_s, "from the actual one": table.ttft_service_s},
            objective.ttft_s,
        ),
        (
            "itl",
            "Inter-token latency",
            {"every gap": table.gap_s[is_ok[table.gap_owner]], "longest gap of a request": table.max_gap_s},
            objective.itl_s,
        ),
        ("tpot", "Time per output token", {"of a request, after its first": table.tpot_s}, None),
        ("e2e", "End to end", {"all requests": table.e2e_s}, objective.e2e_s),
    ]
    return [(f"{name}-distribution", _distribution(title, rows, limit)) for name, title, rows, limit in latencies]


def _distribution(what: str, rows: dict[str, Floats], limit: float | None) -> Figure:
    """Cumulated shares, over a histogram of the first row; without series where there are no values."""
    known = {name: np.sort(np.maximum(row[~np.isnan(row)], MIN_SHOWN_S)) for name, row in rows.items()}
    known = {name: row for name, row in known.items() if len(row)}
    if not known:
        return Figure(what, Axis("", 0, 1), Axis("", 0, 1), ())
    axis = fitted(what.lower(), [*known.values(), *_limit(limit)], words.tick, is_log=True)
    edges = np.geomspace(axis.low, axis.high, NUM_BINS + 1)
    series = []
    for index, (name, row) in enumerate(known.items()):
        tone = ("high", "orange")[index]
        if index == 0:
            counts = np.histogram(row, edges)[0] / len(row)
            shape = np.repeat(counts / max(counts.max(), 1e-12) * 0.6, 2)
            series.append(Series("", np.repeat(edges, 2)[1:-1], shape, "middle", "area"))
        shares = np.searchsorted(row, edges, side="right") / len(row)
        series.append(Series(name, edges, shares, tone, is_dashed=index > 0))
    return Figure(
        f"{what}: distribution",
        axis,
        Axis("share at or below", 0.0, 1.04, say=words.share),
        tuple(series),
        tuple(Rule(rule.at, rule.label, True, rule.tone) for rule in _promise(limit)),
        tuple(
            (
                low,
                high,
                f"≤ {words.duration(high)}: "
                + ", ".join(
                    f"{words.share(float(np.searchsorted(row, high, side='right')) / len(row))} ({name})"
                    for name, row in known.items()
                ),
            )
            for low, high in itertools.pairwise(float(edge) for edge in edges)
        ),
        "Lines: the share of values at or below. Shaded: where those of the first lie. 10 µs stands for less.",
    )


def _time_axis(seen: OverTime) -> Axis:
    return Axis("seconds of the run", float(seen.edges_s[0]), float(seen.edges_s[-1]))


def _limit(limit: float | None) -> list[Floats]:
    return [] if limit is None else [np.array([limit])]


def _promise(limit: float | None) -> tuple[Rule, ...]:
    return () if limit is None else (Rule(limit, f"objective {words.tick(limit)}", False),)


def _hovers(
    seen: OverTime, rows: dict[str, Floats], say: Callable[[float], str]
) -> tuple[tuple[float, float, str], ...]:
    spans = itertools.pairwise(float(edge) for edge in seen.edges_s)
    return tuple(
        (
            low,
            high,
            f"{low:.4g}–{high:.4g} s: " + ", ".join(f"{name} {say(float(row[i]))}" for name, row in rows.items()),
        )
        for i, (low, high) in enumerate(spans)
    )
