"""What a run comes to: percentiles, rates, goodput, errors; the whole and by class, tenant and endpoint.

Latencies are those of requests that succeeded; goodput counts every request offered, so that failing fast is no way to
look good. Percentiles are by nearest rank: each is a latency that somebody had.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np

from loadtest.goodput import Objective, within
from loadtest.record import GeneratorHealth, RunHeader
from loadtest.table import Bools, Floats, Recorded, Table, Texts

SUMMARY_VERSION = 1
MAX_GROUPS = 50
REST = "(others)"


class Spread(msgspec.Struct, frozen=True):
    """Of `count` values, in seconds; NaN (null in JSON) without values."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of some of a run's requests. Rates are over the whole run's `duration_s`."""

    num_offered: int
    num_completed: int
    num_good: int
    offered_per_s: float
    completed_per_s: float
    goodput_per_s: float
    goodput_share: float
    """Of the requests offered, those within the objective."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: Spread
    ttft_service_s: Spread
    """From the moment at which the generator took the request up, instead of the intended one."""
    itl_s: Spread
    """Every gap between events with output, of all requests."""
    max_gap_s: Spread
    """The longest gap of each request."""
    tpot_s: Spread
    e2e_s: Spread
    queue_wait_s: Spread
    """Longest wait that the server's queue comments named, of the requests that had one."""
    send_lag_s: Spread
    """How late the generator was."""
    errors: dict[str, int]
    num_resumes: int
    num_resumed: int
    """Requests that were resumed at least once."""


class Correctness(msgspec.Struct, frozen=True):
    """Requests sent again alone, after the run."""

    num_compared: int
    num_equal: int
    num_failed: int
    """The second sending brought nothing to compare; not part of `num_compared`."""
    num_logprobs: int
    differences: dict[str, int]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures. The names are those of the JSON report and stay."""

    summary_version: int = SUMMARY_VERSION
    is_valid: bool
    reasons: list[str]
    """Why the figures are not to be trusted."""
    objective: Objective
    duration_s: float
    """From the first intended send to the last end."""
    all: Group
    by_class: dict[str, Group]
    by_tenant: dict[str, Group]
    by_endpoint: dict[str, Group]
    correctness: Correctness
    generator: GeneratorHealth | None
    header: RunHeader


def summarize(run: Recorded, objective: Objective) -> Summary:
    """All figures of a run under an objective."""
    table = run.table
    duration_s = float(np.nanmax(_ends(table)) - table.intended_s[0]) if len(table) else 0.0
    is_good = within(table, objective)
    return Summary(
        is_valid=not run.reasons,
        reasons=run.reasons,
        objective=objective,
        duration_s=duration_s,
        all=_group(table, is_good, duration_s),
        by_class=_by(table.label, table, is_good, duration_s),
        by_tenant=_by(table.tenant, table, is_good, duration_s),
        by_endpoint=_by(table.endpoint, table, is_good, duration_s),
        correctness=_correctness(run),
        generator=run.end.generator if run.end else None,
        header=run.header,
    )


def spread(values: Floats) -> Spread:
    """Of the values that are no NaN."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Spread(0, *[float("nan")] * 6)
    p50, p90, p95, p99 = np.quantile(values, [0.5, 0.9, 0.95, 0.99], method="inverted_cdf")
    return Spread(
        len(values), float(values.mean()), float(p50), float(p90), float(p95), float(p99), float(values.max())
    )


def groups(texts: Texts) -> dict[str, Bools]:
    """Value -> [n] which rows have it, the most frequent first; beyond `MAX_GROUPS` the rest is one group."""
    counts = sorted(Counter(texts.tolist()).items(), key=lambda item: (-item[1], item[0]))
    if len(counts) > MAX_GROUPS:
        counts = counts[: MAX_GROUPS - 1]
        kept = {text for text, _ in counts}
        texts = np.array([text if text in kept else REST for text in texts], dtype=object)
        counts.append((REST, 0))
    return {text: np.asarray(texts == text, dtype=np.bool_) for text, _ in counts}


def _by(texts: Texts, table: Table, is_good: Bools, duration_s: float) -> dict[str, Group]:
    found = groups(texts)
    if len(found) < 2:  # the whole says the same
        return {}
    return {text: _group(table.select(rows), is_good[rows], duration_s) for text, rows in found.items()}


def _group(table: Table, is_good: Bools, duration_s: float) -> Group:
    def per_s(count: int) -> float:
        return count / duration_s if duration_s > 0 else float("nan")

    is_ok = table.is_ok
    num_good, num_ok = int(is_good.sum()), int(is_ok.sum())
    prompt, output = int(table.prompt_tokens.sum()), int(table.output_tokens.sum())
    errors = Counter(text for text in table.error.tolist() if text)
    return Group(
        num_offered=len(table),
        num_completed=num_ok,
        num_good=num_good,
        offered_per_s=_offered_per_s(table),
        completed_per_s=per_s(num_ok),
        goodput_per_s=per_s(num_good),
        goodput_share=num_good / len(table) if len(table) else float("nan"),
        prompt_tokens=prompt,
        cached_tokens=int(table.cached_tokens.sum()),
        output_tokens=output,
        prompt_tokens_per_s=per_s(prompt),
        output_tokens_per_s=per_s(output),
        ttft_s=spread(table.ttft_s),
        ttft_service_s=spread(table.ttft_service_s),
        itl_s=spread(table.gap_s[is_ok[table.gap_owner]]),
        max_gap_s=spread(table.max_gap_s),
        tpot_s=spread(table.tpot_s),
        e2e_s=spread(table.e2e_s),
        queue_wait_s=spread(table.queue_wait_s),
        send_lag_s=spread(table.send_lag_s),
        errors=dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))),
        num_resumes=int(table.num_resumes.sum()),
        num_resumed=int((table.num_resumes > 0).sum()),
    )


def _offered_per_s(table: Table) -> float:
    """Arrivals per second of the time in which they arrive: n send times have n - 1 gaps between them."""
    window = float(table.intended_s[-1] - table.intended_s[0]) if len(table) else 0.0
    return (len(table) - 1) / window if window > 0 else float("nan")


def _ends(table: Table) -> Floats:
    return np.fmax(table.end_s, table.intended_s)


def _correctness(run: Recorded) -> Correctness:
    compared = [comparison for comparison in run.comparisons if not comparison.is_failed]
    differences = Counter(comparison.difference for comparison in run.comparisons if not comparison.is_equal)
    return Correctness(
        num_compared=len(compared),
        num_equal=sum(comparison.is_equal for comparison in compared),
        num_failed=len(run.comparisons) - len(compared),
        num_logprobs=sum(comparison.num_logprobs for comparison in compared),
        differences=dict(differences.most_common(20)),
    )
