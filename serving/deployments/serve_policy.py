"""The autoscaling policy in the words of Ray Serve 2.60: a class that its controller calls with an AutoscalingContext.

Serve imports what `policy_function` names and builds the class in the controller with `policy_kwargs`; the instance
lives until the next change of the deployment's config. What is imported here comes by reference. Serve wraps the call:
bounds, its own delays (0 here) and, while no replica runs, its cold-start path: 0 -> 1 when a handle has a queued call.

Times of the controller's own clock alone are compared: a replica's data are as old as the controller has seen them
unchanged, so clocks that differ between hosts make nothing stale or fresh.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from serving.deployments.autoscaling import Autoscaler, Demand, Observation, ReplicaLoad, ScalingSettings

logger = logging.getLogger("ray.serve")

STATS: Final = (
    "mark",  # of this reading: differs from the last one
    "running",
    "waiting",
    "max_num_seqs",
    "blocks_used",
    "blocks_total",
    "block_size",
    "finished",
    "tokens_per_s",
    "is_ready",
    "start_s",
    "demand_choices",
    "demand_tokens",
    "demand_age_s",  # below 0: no gateway has told
)
"""What `Replica.record_autoscaling_stats` returns."""


class QueueDelayPolicy:
    """`policy_function: serving.deployments.serve_policy:QueueDelayPolicy`; `policy_kwargs` are `ScalingSettings`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, **settings: Any) -> None:
        """Raises SettingsError and TypeError for kwargs that are no settings."""
        self._autoscaler = Autoscaler(ScalingSettings(**settings))
        self._clock = clock
        self._marks: dict[str, tuple[float, float]] = {}  # replica -> the mark of its latest data, when they came

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: ray.serve.config.AutoscalingContext. Returns the number of replicas and no state of Serve's keeping."""
        now = self._clock()
        replicas, demand = self._read(ctx.raw_metrics or {}, now)
        decision = self._autoscaler.decide(
            Observation(
                now=now,
                num_target=ctx.target_num_replicas,
                num_running=ctx.current_num_replicas,
                min_replicas=ctx.capacity_adjusted_min_replicas,
                max_replicas=ctx.capacity_adjusted_max_replicas,
                replicas=replicas,
                demand=demand,
            )
        )
        if decision.num_replicas != ctx.target_num_replicas:
            logger.info("autoscaling of %s: %s", ctx.deployment_name, decision.reason)
        return decision.num_replicas, {}

    def _read(
        self, metrics: Mapping[str, Mapping[Any, Any]], now: float
    ) -> tuple[tuple[ReplicaLoad, ...], Demand | None]:
        """The latest values of every replica, as `Replica.record_autoscaling_stats` names them."""
        replicas = []
        demand: Demand | None = None
        marks = {}
        for replica in metrics.get("mark", {}):
            values = {name: _latest(metrics.get(name, {}).get(replica)) for name in STATS}
            if None in values.values():
                continue  # half of it cannot be read, for example from a replica of another version
            name = str(getattr(replica, "unique_id", replica))
            # What was never seen to change may be as old as it likes.
            mark, since = self._marks.get(name, (values["mark"], -math.inf))
            marks[name] = (values["mark"], now if values["mark"] != mark else since)
            age_s = now - marks[name][1]
            replicas.append(_load(name, age_s, values))
            if values["demand_age_s"] >= 0.0:
                told = Demand(
                    choices=int(values["demand_choices"]),
                    tokens=int(values["demand_tokens"]),
                    age_s=values["demand_age_s"] + age_s,
                )
                demand = told if demand is None or told.age_s < demand.age_s else demand
        self._marks = marks
        return tuple(replicas), demand


def _latest(series: Any) -> Any:
    return series[-1].value if series else None


def _load(name: str, age_s: float, values: Mapping[str, Any]) -> ReplicaLoad:
    return ReplicaLoad(
        id=name,
        age_s=age_s,
        running=int(values["running"]),
        waiting=int(values["waiting"]),
        slots=int(values["max_num_seqs"]),
        blocks_used=int(values["blocks_used"]),
        blocks_total=int(values["blocks_total"]),
        block_size=int(values["block_size"]),
        finished=int(values["finished"]),
        is_ready=bool(values["is_ready"]),
        start_s=float(values["start_s"]),
    )
