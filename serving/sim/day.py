"""A day of a service in simulated time (C18): the gateway's own queue, simulated replicas, a policy asked every second.

Events are arrivals, ends of rows, starts and deaths of replicas. What the policy sees is a second old, as it is in
Serve; what it asks for takes a start-up time to serve.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import random
from collections.abc import Callable
from typing import Final

from serving.deployments.autoscaling import Demand, Observation, ReplicaLoad
from serving.gateway.queue import Queue
from serving.gateway.streams import Choice, Request
from serving.gateway.ticket import Job, Ticket
from serving.sim.replica import BLOCK, Engine, Replica, blocks_of
from serving.sim.scalers import Scaler
from serving.sim.trace import Arrival, Trace
from serving.types import ModelCard, SamplingParams

BEGINS: Final = 1000.0
TICK_S: Final = 1.0
DETECT_S: Final = 3.5
"""From a replica's death until Serve starts its successor (C19b)."""
CARD: Final = ModelCard(
    fingerprint="sim",
    model="sim",
    max_model_len=8192,
    max_num_seqs=8,
    logits_size=256,
    tokenizer_size=256,
    eos_ids=(0,),
    bos_id=None,
    block_size=BLOCK,
    determinism="exact",
    assets={},
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is simulated beside the load."""

    engine: Engine = dataclasses.field(default_factory=Engine)
    start_s: float = 60.0  # median time from asking for a replica until it serves
    start_spread: tuple[float, float] = (0.8, 1.5)  # factors of it
    min_replicas: int = 1
    max_replicas: int = 24
    slo_s: float = 2.0  # a choice that waits longer is late


@dataclasses.dataclass(slots=True)
class Outcome:
    """Of one day under one policy."""

    waits: list[float] = dataclasses.field(default_factory=list)  # by arrival, in seconds
    num_late: int = 0
    replica_s: float = 0.0  # of replicas that serve or start
    num_out: int = 0  # decisions
    num_in: int = 0
    most: int = 0
    late_minutes: dict[int, int] = dataclasses.field(default_factory=dict)  # minute of arrival -> late choices
    num_lost: int = 0

    @property
    def attainment(self) -> float:
        return 1.0 - self.num_late / max(len(self.waits), 1)

    @property
    def replica_hours(self) -> float:
        return self.replica_s / 3600.0

    def wait_at(self, share: float) -> float:
        """A percentile of the waits in seconds."""
        return sorted(self.waits)[min(int(share * len(self.waits)), len(self.waits) - 1)] if self.waits else 0.0


class Day:
    """One run. Times are those of the trace plus BEGINS."""

    def __init__(self, trace: Trace, service: Service, scaler: Scaler, *, seed: int = 0, first: int = 1) -> None:
        """first: replicas that serve from the beginning."""
        self.outcome = Outcome()
        self._trace = trace
        self._service = service
        self._scaler = scaler
        self._rng = random.Random(seed)
        self._now = BEGINS
        self._target = first
        self._queue = Queue(1 << 30)
        self._replicas = [Replica(service.engine, BEGINS, BEGINS) for _ in range(first)]
        self._loading: list[tuple[float, float]] = []  # (ready at, asked at); the latest asked last
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._orders = itertools.count()
        self._versions: dict[str, int] = {}
        self._unfinished = 0
        self._snapshot: tuple[tuple[ReplicaLoad, ...], Demand] = ((), Demand(choices=0, tokens=0, age_s=0.0))

    def run(self) -> Outcome:
        self._at(BEGINS, self._tick)
        for at, pick in self._trace.failures:
            self._at(BEGINS + at, functools.partial(self._fail, pick))
        arrivals = iter(self._trace.arrivals)
        arrival = next(arrivals, None)
        end = BEGINS + self._trace.duration_s
        while self._now < end or self._unfinished:
            if arrival is not None and BEGINS + arrival.at <= self._events[0][0]:
                self._now = BEGINS + arrival.at
                self._arrive(arrival)
                arrival = next(arrivals, None)
                continue
            self._now, _, happens = heapq.heappop(self._events)
            happens()
            if self._now > end + 3600.0:  # a policy that left nobody to serve them
                self.outcome.num_lost = self._unfinished
                break
        return self.outcome

    def _at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happens))

    # --- choices ----------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        request = Request(id="", created=0, card=CARD, deadline=float("inf"))
        choice = Choice(0, request, bytes(4 * arrival.prompt), SamplingParams(max_tokens=arrival.output))
        order = next(self._orders)
        ticket = Ticket(choice, Job(request), order, 0, self._now, float("inf"))
        self.outcome.waits.append(-1.0)
        self._unfinished += 1
        self._queue.push(ticket, self._now)
        self._pump()

    def _pump(self) -> None:
        """Late binding as the gateway does it: the least loaded replica that has a slot."""
        while len(self._queue):
            best: Replica | None = None
            for replica in self._replicas:
                if replica.num_rows < replica.engine.slots and (best is None or replica.num_rows < best.num_rows):
                    best = replica
            if best is None:
                return
            ticket = self._queue.pop(self._now)
            if not best.has_room(blocks_of(ticket)):
                best = next((each for each in self._replicas if each.has_room(blocks_of(ticket))), None)
                if best is None:
                    ticket.goes_first = True
                    self._queue.push(ticket, self._now)
                    return
            self._start(best, ticket)

    def _start(self, replica: Replica, ticket: Ticket) -> None:
        if self.outcome.waits[ticket.order] < 0.0:
            waited = self._now - ticket.enqueued_at
            self.outcome.waits[ticket.order] = waited
            if waited > self._service.slo_s:
                self.outcome.num_late += 1
                minute = int((ticket.enqueued_at - BEGINS) / 60.0)
                self.outcome.late_minutes[minute] = self.outcome.late_minutes.get(minute, 0) + 1
        made = len(ticket.choice.output_ids)
        replica.take(ticket, ticket.choice.sampling.max_tokens - made, self._now)
        self._expect_end(replica)

    def _expect_end(self, replica: Replica) -> None:
        version = self._versions[replica.name] = self._versions.get(replica.name, 0) + 1
        when = replica.next_end()
        if when is not None:
            self._at(when, lambda: self._end_row(replica, version))

    def _end_row(self, replica: Replica, version: int) -> None:
        if self._versions.get(replica.name) != version:
            return  # rows came or went since
        replica.end_first(self._now)
        self._unfinished -= 1
        self._expect_end(replica)
        self._pump()

    # --- replicas ---------------------------------------------------------------------------------

    def _stop(self, replica: Replica) -> None:
        """Its rows go on elsewhere, from what they had made (C2)."""
        self._replicas.remove(replica)
        self._versions.pop(replica.name, None)
        for ticket, made in replica.stop(self._now):
            ticket.choice.output_ids.extend([0] * min(made, ticket.choice.sampling.max_tokens - 1))
            ticket.goes_first = True
            self._queue.push(ticket, self._now)
        self._pump()

    def _fail(self, pick: float) -> None:
        if self._replicas:
            self._stop(self._replicas[int(pick * len(self._replicas))])
            self._at(self._now + DETECT_S, self._fill)

    def _fill(self) -> None:
        """Serve's own work: as many as asked for, those that do not run yet leaving first."""
        while len(self._replicas) + len(self._loading) < self._target:
            ready_at = self._now + self._service.start_s * self._rng.uniform(*self._service.start_spread)
            self._loading.append((ready_at, self._now))
            self._at(ready_at, self._serve_started)
        while len(self._replicas) + len(self._loading) > self._target:
            if self._loading:
                self._loading.pop()
            else:
                self._stop(self._replicas[-1])

    def _serve_started(self) -> None:
        for ready_at, asked_at in [entry for entry in self._loading if entry[0] <= self._now]:
            self._loading.remove((ready_at, asked_at))
            self._replicas.append(Replica(self._service.engine, self._now, asked_at))
        self._pump()

    # --- the policy -------------------------------------------------------------------------------

    def _tick(self) -> None:
        outcome, service = self.outcome, self._service
        there = len(self._replicas) + len(self._loading)
        outcome.replica_s += there * TICK_S
        outcome.most = max(outcome.most, there)
        loads, demand = self._snapshot
        running = {replica.name for replica in self._replicas}
        decision = self._scaler.decide(
            Observation(
                now=self._now,
                num_target=self._target,
                num_running=len(self._replicas),
                min_replicas=service.min_replicas,
                max_replicas=service.max_replicas,
                replicas=tuple(load for load in loads if load.id in running),
                demand=demand,
            )
        )
        wanted = min(max(decision.num_replicas, service.min_replicas), service.max_replicas)
        if wanted != self._target:
            outcome.num_out += wanted > self._target
            outcome.num_in += wanted < self._target
            self._target = wanted
            self._fill()
        self._snapshot = self._look()
        self._at(self._now + TICK_S, self._tick)

    def _look(self) -> tuple[tuple[ReplicaLoad, ...], Demand]:
        engine = self._service.engine
        loads = tuple(
            ReplicaLoad(
                id=replica.name,
                age_s=TICK_S,
                running=replica.num_rows,
                waiting=0,
                slots=engine.slots,
                blocks_used=replica.blocks_used,
                blocks_total=engine.blocks,
                block_size=BLOCK,
                finished=replica.finished,
                start_s=replica.start_s,
            )
            for replica in self._replicas
        )
        return loads, Demand(choices=len(self._queue), tokens=self._queue.num_tokens, age_s=TICK_S)
