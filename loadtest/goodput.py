"""Which requests were served as promised: a service-level objective, and who is within it."""

from __future__ import annotations

import msgspec
import numpy as np

from loadtest.table import Bools, Table


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must meet, besides succeeding. None = that limit is not part of the promise.

    A request's inter-token latency is the `itl_percentile`-th percentile of its own gaps, by nearest rank: with 100
    every gap counts, with 99 one in a hundred may be longer (none in a stream of fewer than 100). An answer that is
    not streamed shows its first token at its end. Raises ValueError naming what is wrong.
    """

    ttft_s: float | None = None
    """First output, from the intended send time."""
    itl_s: float | None = None
    itl_percentile: float = 99.0
    e2e_s: float | None = None
    """Last byte, from the intended send time."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s", "e2e_s"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < float("inf"):
                raise ValueError(f"{name} must be above 0 seconds, not {limit:g}")
        if not 0 < self.itl_percentile <= 100:
            raise ValueError(f"itl_percentile must be above 0 and at most 100, not {self.itl_percentile:g}")

    def words(self) -> str:
        """For people: `TTFT ≤ 2 s, p99 of a request's gaps ≤ 0.2 s`."""
        promises = []
        if self.ttft_s is not None:
            promises.append(f"TTFT ≤ {self.ttft_s:g} s")
        if self.itl_s is not None:
            which = "every gap" if self.itl_percentile == 100 else f"p{self.itl_percentile:g} of a request's gaps"
            promises.append(f"{which} ≤ {self.itl_s:g} s")
        if self.e2e_s is not None:
            promises.append(f"end to end ≤ {self.e2e_s:g} s")
        return ", ".join(promises) or "success"


def within(table: Table, objective: Objective) -> Bools:
    """[n] whether each request succeeded and met every limit."""
    is_good = table.is_ok
    if objective.ttft_s is not None:
        seen_s = np.where(table.is_stream, table.first_token_s, table.end_s) - table.intended_s
        is_good = is_good & (seen_s <= objective.ttft_s)  # NaN, an answer without output, is not
    if objective.itl_s is not None:
        # The k-th smallest of n gaps is within the limit just when k of them are: no sorting.
        num_within = np.bincount(table.gap_owner[table.gap_s <= objective.itl_s], minlength=len(table))
        needed = np.ceil(np.round(table.num_gaps * (objective.itl_percentile / 100), 9))
        is_good = is_good & (num_within >= needed)
    if objective.e2e_s is not None:
        is_good = is_good & (table.e2e_s <= objective.e2e_s)
    return is_good
