"""The requests of a run as columns, so that a million tokens are summed up in a moment."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.record import (
    FORMAT_VERSION,
    Chapter,
    Comparison,
    Line,
    Observation,
    RecordError,
    RunEnd,
    RunHeader,
    read_lines,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.object_]

_TIMES = ("intended_s", "started_s", "first_token_s", "end_s", "queue_wait_s")
_COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens", "num_resumes")
_TEXTS = ("label", "tenant", "endpoint", "error")


@dataclasses.dataclass(frozen=True)
class Table:
    """`n` requests in the order of their intended send times, and the `g` gaps between their events.

    Times are seconds since the run's start, NaN where they never came; counts are 0 where the server did not say.
    """

    id: Ints  # [n]
    intended_s: Floats  # [n]
    started_s: Floats  # [n]
    first_token_s: Floats  # [n]
    last_token_s: Floats  # [n]
    end_s: Floats  # [n]
    queue_wait_s: Floats  # [n]
    is_stream: Bools  # [n]
    prompt_tokens: Ints  # [n]
    output_tokens: Ints  # [n]
    cached_tokens: Ints  # [n]
    num_resumes: Ints  # [n]
    label: Texts  # [n] str
    tenant: Texts  # [n] str
    endpoint: Texts  # [n] str
    error: Texts  # [n] str, "" = success
    gap_s: Floats  # [g] seconds from one event with output to the next, in order
    gap_owner: Ints  # [g] row of the request, ascending
    gap_end_s: Floats  # [g] when the gap ended

    def __len__(self) -> int:
        return len(self.id)

    @property
    def is_ok(self) -> Bools:
        """[n]"""
        return np.asarray(self.error == "", dtype=np.bool_)

    @property
    def ttft_s(self) -> Floats:
        """[n] first output of streams that succeeded, from the intended send time; NaN for the others."""
        return np.where(self.is_ok & self.is_stream, self.first_token_s - self.intended_s, np.nan)

    @property
    def ttft_service_s(self) -> Floats:
        """[n] the same from the moment at which the generator took the request up."""
        return np.where(self.is_ok & self.is_stream, self.first_token_s - self.started_s, np.nan)

    @property
    def e2e_s(self) -> Floats:
        """[n] the last byte of requests that succeeded, from the intended send time."""
        return np.where(self.is_ok, self.end_s - self.intended_s, np.nan)

    @property
    def tpot_s(self) -> Floats:
        """[n] time per output token after the first, of streams with two tokens and events or more."""
        counts = np.maximum(self.output_tokens - 1, 1)
        is_known = self.is_ok & (self.output_tokens > 1) & (self.num_gaps > 0)
        return np.where(is_known, (self.last_token_s - self.first_token_s) / counts, np.nan)

    @property
    def send_lag_s(self) -> Floats:
        """[n] how late the generator took each request up."""
        return self.started_s - self.intended_s

    @property
    def num_gaps(self) -> Ints:
        """[n]"""
        return np.bincount(self.gap_owner, minlength=len(self))

    @property
    def max_gap_s(self) -> Floats:
        """[n] longest gap of streams that succeeded, NaN without one."""
        counts = self.num_gaps
        longest = np.full(len(self), np.nan)
        if len(self.gap_s):
            starts = (np.cumsum(counts) - counts)[counts > 0]
            longest[counts > 0] = np.maximum.reduceat(self.gap_s, starts)
        return np.where(self.is_ok, longest, np.nan)

    def select(self, is_kept: Bools) -> Table:
        """The rows for which `is_kept` [n] is true."""
        gaps = is_kept[self.gap_owner]
        columns = {
            field.name: getattr(self, field.name)[gaps if field.name.startswith("gap_") else is_kept]
            for field in dataclasses.fields(self)
        }
        columns["gap_owner"] = (np.cumsum(is_kept) - 1)[columns["gap_owner"]]
        return Table(**columns)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A record file: what was meant, what came of it."""

    header: RunHeader
    table: Table
    comparisons: tuple[Comparison, ...] = ()
    chapters: tuple[Chapter, ...] = ()
    end: RunEnd | None = None

    @property
    def reasons(self) -> list[str]:
        """Why its figures are not to be trusted; empty for a valid run."""
        if self.end is None:
            return ["the record has no end: the run was cut off"]
        if self.end.is_valid:
            return []
        return self.end.reasons or ["the generator called its run invalid without a reason"]

    def since(self, second: float) -> Recorded:
        """Without the requests meant to be sent before `second`: the warm-up."""
        return dataclasses.replace(self, table=self.table.select(self.table.intended_s >= second))


def load(path: Path | str) -> Recorded:
    """Read a record file. Raises RecordError for one that is none, OSError where it cannot be read."""
    return gather(read_lines(path), str(path))


def gather(lines: Iterable[Line], name: str = "record") -> Recorded:
    """Columns from lines, one at a time: only columns stay in memory. Raises RecordError naming `name`."""
    header: RunHeader | None = None
    end: RunEnd | None = None
    comparisons: list[Comparison] = []
    chapters: list[Chapter] = []
    columns = _Columns()
    for line in lines:
        if (header is None) != isinstance(line, RunHeader):
            raise RecordError(f"{name}: does not begin with a run line" if header is None else f"{name}: two headers")
        match line:
            case RunHeader():
                if line.format_version != FORMAT_VERSION:
                    raise RecordError(f"{name}: format {line.format_version}, this version reads {FORMAT_VERSION}")
                header = line
            case Observation():
                columns.add(line)
            case Comparison():
                comparisons.append(line)
            case Chapter():
                chapters.append(line)
            case RunEnd():
                end = line
    if header is None:
        raise RecordError(f"{name}: is empty")
    return Recorded(header, columns.table(), tuple(comparisons), tuple(chapters), end)


class _Columns:
    """Grows by one observation at a time: eight bytes a number, no object."""

    def __init__(self) -> None:
        self.times = {name: array.array("d") for name in _TIMES}
        self.counts = {name: array.array("q") for name in ("id", "is_stream", *_COUNTS)}
        self.texts: dict[str, list[str]] = {name: [] for name in _TEXTS}
        self.token_times = array.array("d")
        self.num_tokens = array.array("q")

    def add(self, seen: Observation) -> None:
        for name, times in self.times.items():
            value = getattr(seen, name)
            times.append(np.nan if value is None else value)
        for name, counts in self.counts.items():
            counts.append(getattr(seen, name) or 0)
        for name, texts in self.texts.items():
            texts.append(getattr(seen, name) or "")
        self.token_times.extend(seen.token_times_s)
        self.num_tokens.append(len(seen.token_times_s))

    def table(self) -> Table:
        times = {name: np.array(column, dtype=np.float64) for name, column in self.times.items()}
        counts = {name: np.array(column, dtype=np.int64) for name, column in self.counts.items()}
        order = np.lexsort((counts["id"], times["intended_s"]))
        token_times = np.array(self.token_times, dtype=np.float64)
        lengths = np.array(self.num_tokens, dtype=np.int64)
        stops = np.cumsum(lengths)
        last = np.full(len(order), np.nan)
        last[lengths > 0] = token_times[stops[lengths > 0] - 1]
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        owner = np.repeat(place, lengths)
        is_gap = np.ones(len(token_times), dtype=np.bool_)  # every event but the first of each request
        is_gap[(stops - lengths)[lengths > 0]] = False
        gaps, owner, ends = np.diff(token_times, prepend=0.0)[is_gap], owner[is_gap], token_times[is_gap]
        by_owner = np.argsort(owner, kind="stable")
        is_stream = counts.pop("is_stream") != 0
        texts = {name: np.array(column, dtype=object) for name, column in self.texts.items()}
        by_request: dict[str, Any] = {name: column[order] for name, column in (times | counts | texts).items()}
        return Table(
            **by_request,
            is_stream=is_stream[order],
            last_token_s=last[order],
            gap_s=gaps[by_owner],
            gap_owner=owner[by_owner],
            gap_end_s=ends[by_owner],
        )
