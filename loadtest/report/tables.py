"""The tables of a report, as text: the same rows for a page and for a terminal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from loadtest.knee import REASONS, Knee
from loadtest.report import words
from loadtest.summary import Group, Spread, Summary


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table: the first column is text, the others read from the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    minor: tuple[str, ...] = ()  # columns that a narrow terminal does without, first those to go first


def headline(summary: Summary) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the few figures that come first."""
    group = summary.all
    tokens = f"{words.rate(group.prompt_tokens_per_s)} in"
    return [
        ("Goodput", words.rate(group.goodput_per_s), f"{words.share(group.goodput_share)} of the requests offered"),
        ("Requests", words.rate(group.completed_per_s), f"of {words.rate(group.offered_per_s)} offered"),
        ("Output tokens", words.rate(group.output_tokens_per_s), tokens),
        ("TTFT p99", words.duration(group.ttft_s.p99), f"median {words.duration(group.ttft_s.p50)}"),
        ("ITL p99", words.duration(group.itl_s.p99), f"median {words.duration(group.itl_s.p50)}"),
        ("Errors", words.number(sum(group.errors.values())), f"of {words.number(group.num_offered)} requests"),
    ]


def latencies(group: Group) -> Sheet:
    rows: list[tuple[str, Spread]] = [
        ("Time to first token", group.ttft_s),
        ("… from the actual send", group.ttft_service_s),
        ("Inter-token latency", group.itl_s),
        ("Longest gap of a request", group.max_gap_s),
        ("Time per output token", group.tpot_s),
        ("End to end", group.e2e_s),
        ("Queue wait (server's)", group.queue_wait_s),
        ("Lag of the generator", group.send_lag_s),
    ]
    return Sheet(
        "Latencies",
        ("", "count", "mean", "p50", "p90", "p95", "p99", "max"),
        tuple((name, words.number(row.count), *_durations(row)) for name, row in rows if row.count),
        "From the intended send time unless said otherwise, of requests that succeeded; percentiles by nearest rank.",
        minor=("mean", "p95", "count"),
    )


def totals(summary: Summary) -> Sheet:
    group, correct = summary.all, summary.correctness
    rows = [
        ("Requests offered, completed, within the objective", _three(group)),
        ("Tokens in, of them cached, out", ", ".join(map(words.number, _tokens(group)))),
        (
            "Requests resumed by the server",
            f"{words.number(group.num_resumed)} ({words.number(group.num_resumes)} times)",
        ),
        ("Sent again alone and compared", _compared(summary)),
    ]
    if correct.num_failed:
        rows.append(("Second sendings that failed", words.number(correct.num_failed)))
    rows += [(f"Differed: {what}", words.number(count)) for what, count in correct.differences.items()]
    rows += [(f"Error: {name}", words.number(count)) for name, count in group.errors.items()]
    return Sheet("Counts", ("", "figure"), tuple(rows))


def by(title: str, groups: dict[str, Group]) -> Sheet:
    spreads = ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "E2E p50", "E2E p99")
    columns = ("", "offered", "done", "good", "goodput", "tokens", *spreads, "errors")
    rows = tuple(_group_row(name or "(none)", group) for name, group in groups.items())
    return Sheet(
        title, columns, rows, minor=("offered", "E2E p50", "ITL p50", "tokens", "good", "done", "E2E p99", "TTFT p50")
    )


def sheets(summary: Summary) -> list[Sheet]:
    """Latencies, counts, and the groups of which there are several."""
    kinds = (("By class", summary.by_class), ("By tenant", summary.by_tenant), ("By endpoint", summary.by_endpoint))
    found = [latencies(summary.all), *(by(title, groups) for title, groups in kinds if groups), totals(summary)]
    return [sheet for sheet in found if sheet.rows]


def knee_sheet(knee: Knee) -> Sheet:
    rows = tuple(
        (
            words.rate(trial.rate),
            "held" if trial.has_held else "broke" if trial.summary.is_valid else "invalid",
            words.share(group.goodput_share),
            words.rate(group.goodput_per_s),
            words.rate(group.output_tokens_per_s),
            *(
                words.duration(value)
                for value in (group.ttft_s.p50, group.ttft_s.p99, group.itl_s.p50, group.itl_s.p99)
            ),
        )
        for trial in knee.trials
        for group in (trial.summary.all,)
    )
    columns = ("rate", "verdict", "share", "goodput", "tokens out", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99")
    return Sheet("Runs of the search", columns, rows, knee_words(knee), minor=("tokens out", "ITL p50", "TTFT p50"))


def knee_words(knee: Knee) -> str:
    """What the search found, in a sentence."""
    need = words.share(knee.settings.min_share)
    if not knee.rate:
        return f"No rate tried kept {need} of the requests within the objective: {REASONS[knee.reason]}."
    beyond = "" if knee.broken_at == float("inf") else f"; {words.rate(knee.broken_at)} did not"
    return f"{words.rate(knee.rate)} kept {need} of the requests within the objective{beyond} ({REASONS[knee.reason]})."


def settings(summary: Summary) -> Sheet:
    """How the run was meant to be and how its generator fared."""
    header = summary.header
    rows: list[tuple[str, str]] = [
        ("Target", header.target),
        ("Model", header.model),
        ("Seed", str(header.seed)),
        ("Loop", header.mode),
        ("Prompt lengths", header.prompt_lengths),
        ("Workers", str(header.num_workers)),
        ("Argosy", header.argosy_version or words.NOTHING),
        ("Duration", words.duration(summary.duration_s)),
        ("Objective", summary.objective.words()),
    ]
    for name, mapping in (
        ("Arrivals", header.arrivals),
        ("Workload", header.workload),
        ("Limits", header.limits),
        ("Server", header.server),
        ("Labels", header.labels),
    ):
        rows += [(f"{name}: {key}", _plain(value)) for key, value in mapping.items()]
    if summary.generator is not None:
        generator = summary.generator
        rows += [
            ("Generator: intended, sent", f"{generator.num_intended}, {generator.num_sent}"),
            ("Generator: lag p50, p99, max", _lags(summary)),
            ("Generator: event loop lag p99, max", _pair(generator.loop_lag_p99_s, generator.loop_lag_max_s)),
            ("Generator: busiest", f"{words.share(generator.cpu_fraction)} of a core"),
            ("Generator: most in flight", str(generator.max_in_flight)),
        ]
    return Sheet("Settings", ("", "value"), tuple(rows))


def _group_row(name: str, group: Group) -> tuple[str, ...]:
    counts = (group.num_offered, group.num_completed, group.num_good)
    spreads = (group.ttft_s, group.itl_s, group.e2e_s)
    return (
        name,
        *map(words.number, counts),
        words.share(group.goodput_share),
        words.rate(group.output_tokens_per_s),
        *(words.duration(value) for spread in spreads for value in (spread.p50, spread.p99)),
        words.number(sum(group.errors.values())),
    )


def _durations(row: Spread) -> tuple[str, ...]:
    return tuple(map(words.duration, (row.mean, row.p50, row.p90, row.p95, row.p99, row.max)))


def _three(group: Group) -> str:
    return ", ".join(map(words.number, (group.num_offered, group.num_completed, group.num_good)))


def _tokens(group: Group) -> tuple[int, int, int]:
    return group.prompt_tokens, group.cached_tokens, group.output_tokens


def _compared(summary: Summary) -> str:
    correct = summary.correctness
    if not correct.num_compared:
        return "none"
    equal = "all equal" if correct.num_equal == correct.num_compared else f"{words.number(correct.num_equal)} equal"
    return f"{words.number(correct.num_compared)}, {equal} ({words.number(correct.num_logprobs)} logprobs)"


def _lags(summary: Summary) -> str:
    assert summary.generator is not None
    lags = (summary.generator.send_lag_p50_s, summary.generator.send_lag_p99_s, summary.generator.send_lag_max_s)
    return ", ".join(map(words.duration, lags))


def _pair(first: float, second: float) -> str:
    return f"{words.duration(first)}, {words.duration(second)}"


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 400 else text[:399] + "…"
