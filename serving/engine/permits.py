"""How many choices gateways may send to a replica (C22).

A few wait here, so that a slot that becomes free is filled in the next step; everything else waits in
the gateways, where binding is late. Permits are cumulative and never taken back, so several gateways
may together hold more of them than there is room: what comes beyond the limit is rejected as
`overfull`, and its gateway queues it again.
"""

from __future__ import annotations

import math


class Permits:
    """The bounds of one replica."""

    def __init__(self, max_num_seqs: int) -> None:
        self._capacity = max_num_seqs + max(1, max_num_seqs // 2)  # what is granted: half a batch waits
        self._limit = 3 * max_num_seqs  # what is taken: a batch runs, two wait

    def share(self, num_outstanding: int, num_connections: int) -> int:
        """Permits for one of the connections beyond what it has sent already."""
        free = self._capacity - num_outstanding
        return math.ceil(free / num_connections) if free > 0 else 0

    def is_overfull(self, num_outstanding: int) -> bool:
        """Whether one more would be too many."""
        return num_outstanding >= self._limit
