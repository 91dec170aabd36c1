"""A run over time: percentiles, rates and how many requests were where, in slices of equal length."""

from __future__ import annotations

import dataclasses

import numpy as np

from loadtest.table import Bools, Floats, Table

MAX_SLICES = 120
PER_SLICE, MIN_PER_SLICE = 40, 5  # requests, on average: many where there are, so that a p99 says something
FEW_SLICES = 20


@dataclasses.dataclass(frozen=True)
class Series:
    """`s` slices. Percentiles are NaN where nothing happened in a slice."""

    edges_s: Floats  # [s + 1] seconds of the run
    ttft_s: dict[int, Floats]  # percentile -> [s], by intended send time
    e2e_s: dict[int, Floats]  # percentile -> [s], by intended send time
    itl_s: dict[int, Floats]  # percentile -> [s], by the time at which a gap ended
    offered_per_s: Floats  # [s]
    completed_per_s: Floats  # [s]
    good_per_s: Floats  # [s], by the time at which a request ended
    failed_per_s: Floats  # [s]
    output_tokens_per_s: Floats  # [s], events with output; one is a token unless the server joins several
    num_waiting: Floats  # [s] mean number of requests due, without a first token
    num_running: Floats  # [s] mean number of streams between first and last token

    @property
    def middles_s(self) -> Floats:
        """[s]"""
        return (self.edges_s[1:] + self.edges_s[:-1]) / 2


def over_time(table: Table, is_good: Bools, percentiles: tuple[int, ...] = (50, 90, 99)) -> Series:
    """Slices over a table with at least one row; `is_good` [n] is who was within the objective."""
    start = float(table.intended_s[0])
    ends = np.fmax(table.end_s, table.intended_s)
    stop = max(float(ends.max()), start + 1e-3)
    num_slices = max(1, min(MAX_SLICES, max(len(table) // PER_SLICE, min(FEW_SLICES, len(table) // MIN_PER_SLICE))))
    edges = np.linspace(start, stop, num_slices + 1)
    length = edges[1] - edges[0]

    def per_s(times: Floats) -> Floats:
        return np.asarray(np.histogram(times, edges)[0] / length, dtype=np.float64)

    is_ok = table.is_ok
    is_token = is_ok[table.gap_owner]
    firsts = table.first_token_s[is_ok & ~np.isnan(table.first_token_s)]
    # A request that never showed a token waited until it ended.
    begins = np.fmin(np.where(np.isnan(table.first_token_s), ends, table.first_token_s), ends)
    return Series(
        edges_s=edges,
        ttft_s=_percentiles(table.intended_s, table.ttft_s, edges, percentiles),
        e2e_s=_percentiles(table.intended_s, table.e2e_s, edges, percentiles),
        itl_s=_percentiles(table.gap_end_s[is_token], table.gap_s[is_token], edges, percentiles),
        offered_per_s=per_s(table.intended_s),
        completed_per_s=per_s(ends[is_ok]),
        good_per_s=per_s(ends[is_good]),
        failed_per_s=per_s(ends[~is_ok]),
        output_tokens_per_s=per_s(np.concatenate([firsts, table.gap_end_s[is_token]])),
        num_waiting=_mean_between(table.intended_s, begins, edges),
        num_running=_mean_between(begins, ends, edges),
    )


def _percentiles(times: Floats, values: Floats, edges: Floats, percentiles: tuple[int, ...]) -> dict[int, Floats]:
    """Percentile -> [s], by nearest rank, of the values (NaN: none) that fall into each slice."""
    is_known = ~np.isnan(values)
    times, values = times[is_known], values[is_known]
    num_slices = len(edges) - 1
    place = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, num_slices - 1)
    order = np.lexsort((values, place))
    values = values[order]
    counts = np.bincount(place, minlength=num_slices)
    starts = np.cumsum(counts) - counts
    found = {}
    for percentile in percentiles:
        rank = np.ceil(np.round(counts * (percentile / 100), 9)).astype(np.int64)
        row = np.full(num_slices, np.nan)
        row[counts > 0] = values[(starts + np.maximum(rank, 1) - 1)[counts > 0]]
        found[percentile] = row
    return found


def _mean_between(begins: Floats, ends: Floats, edges: Floats) -> Floats:
    """[s] mean number of intervals that cover a slice: the time that they spend in it, over its length."""
    # Time spent before an edge, summed over intervals: sum of min(end, edge) - min(begin, edge).
    before = _sum_up_to(ends, edges) - _sum_up_to(begins, edges)
    return np.asarray(np.maximum(np.diff(before) / np.diff(edges), 0.0), dtype=np.float64)


def _sum_up_to(times: Floats, edges: Floats) -> Floats:
    """For each edge, the sum over times of min(time, edge)."""
    ordered = np.sort(times)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    num_below = np.searchsorted(ordered, edges)
    return np.asarray(sums[num_below] + (len(ordered) - num_below) * edges, dtype=np.float64)
