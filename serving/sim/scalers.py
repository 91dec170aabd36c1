"""Other ways to decide how many replicas there are, to compare the policy with."""

from __future__ import annotations

import collections
import math
from typing import Protocol

from serving.deployments.autoscaling import Autoscaler, Decision, Observation


class Scaler(Protocol):
    """Asked once a second."""

    def decide(self, seen: Observation) -> Decision: ...


class Fixed:
    """Always as many."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas

    def decide(self, seen: Observation) -> Decision:
        return Decision(self._num_replicas, "fixed")


class OngoingRequests:
    """Serve's default policy: as many as the mean number of ongoing requests needs at so many each, after delays.

    It counts what waits in gateways, which Serve itself could not see (C19).
    """

    def __init__(
        self, per_replica: float, *, look_back_s: float = 30.0, up_delay_s: float = 30.0, down_delay_s: float = 600.0
    ) -> None:
        """The defaults are Serve's (ray.serve.config.AutoscalingConfig, 2.60)."""
        self._per_replica = per_replica
        self._look_back_s = look_back_s
        self._up_delay_s = up_delay_s
        self._down_delay_s = down_delay_s
        self._seen: collections.deque[tuple[float, int]] = collections.deque()
        self._sum = 0
        self._up_since: float | None = None
        self._down_since: float | None = None

    def decide(self, seen: Observation) -> Decision:
        now = seen.now
        ongoing = sum(each.running + each.waiting for each in seen.replicas)
        ongoing += seen.demand.choices if seen.demand else 0
        self._seen.append((now, ongoing))
        self._sum += ongoing
        while self._seen[0][0] < now - self._look_back_s:
            self._sum -= self._seen.popleft()[1]
        wanted = math.ceil(self._sum / len(self._seen) / self._per_replica)
        wanted = min(max(wanted, seen.min_replicas), seen.max_replicas)
        self._up_since = (self._up_since or now) if wanted > seen.num_target else None
        self._down_since = (self._down_since or now) if wanted < seen.num_target else None
        is_due = (self._up_since is not None and now - self._up_since >= self._up_delay_s) or (
            self._down_since is not None and now - self._down_since >= self._down_delay_s
        )
        if is_due:
            self._up_since = self._down_since = None
        return Decision(wanted if is_due else seen.num_target, f"{self._sum / len(self._seen):.1f} requests")


class Schedule:
    """What somebody who knows the day has written down: replicas that serve, by the minute."""

    def __init__(self, minutes: list[int], *, lead_s: float, begins: float) -> None:
        """lead_s: so long before a replica must serve it is asked for."""
        self._minutes = minutes
        self._lead_s = lead_s
        self._begins = begins

    def decide(self, seen: Observation) -> Decision:
        first = int((seen.now - self._begins) / 60.0)
        last = int((seen.now - self._begins + self._lead_s) / 60.0)
        return Decision(max(self._minutes[first : last + 1] or [self._minutes[-1]]), "scheduled")


__all__ = ["Autoscaler", "Fixed", "OngoingRequests", "Scaler", "Schedule"]
