"""The simulated day's queue against the gateway's whole data plane: placement, routing, permits and links, with the
same replicas behind them, give the same waits."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable

import pytest

from serving import wire
from serving.gateway.link import Link
from serving.gateway.placement import Placement
from serving.gateway.streams import Choice, Request
from serving.gateway.ticket import Job, Ticket
from serving.sim.day import BEGINS, CARD, Day, Service
from serving.sim.replica import Engine, Replica
from serving.sim.scalers import Fixed
from serving.sim.trace import Trace, day
from serving.types import SamplingParams
from tests.gateway.test_pulse import make_beat

BEAT_S = 0.5


class Plane:
    """A `Placement` in simulated time, over the simulated replicas of serving/sim."""

    def __init__(self, num_replicas: int, engine: Engine) -> None:
        self.now = BEGINS
        self.waits: list[float] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.placement = Placement(max_queue_len=1 << 20, queue_timeout_s=1e9, clock=lambda: self.now)
        self.replicas = [LinkedReplica(self, engine, f"replica-{at}") for at in range(num_replicas)]

    def at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happens))

    def run(self, trace: Trace) -> list[float]:
        requests = [
            self._request(index, arrival.prompt, arrival.output) for index, arrival in enumerate(trace.arrivals)
        ]
        for request, arrival in zip(requests, trace.arrivals, strict=True):
            self.at(BEGINS + arrival.at, lambda request=request: self.placement.submit(request))
        self.at(BEGINS, self._tick)
        while any(not request.choices[0].is_done for request in requests[-1:]) or self.placement.num_unfinished:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        return [request.started_at - request.queued_at for request in requests]  # type: ignore[operator]

    def _tick(self) -> None:
        for replica in self.replicas:
            replica.beat()
        self.placement.tick()
        self.at(self.now + BEAT_S, self._tick)

    @staticmethod
    def _request(index: int, prompt: int, output: int) -> Request:
        request = Request(id=str(index), created=0, card=CARD, deadline=float("inf"))
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        request.choices.append(Choice(0, request, bytes(4 * prompt), sampling))
        return request


class LinkedReplica:
    """A simulated replica at the other end of a real link: a permit for every free slot, and none for what waits."""

    def __init__(self, plane: Plane, engine: Engine, name: str) -> None:
        self._plane = plane
        self._replica = Replica(engine, plane.now, plane.now)
        self._num_submitted = 0
        self._version = 0
        self.link = Link(
            wire.HelloReply(1, CARD, 1, name, b"", b""),
            plane.placement,
            write=self._receive,
            abort=lambda: None,
            defer=lambda function: function(),
            clock=lambda: plane.now,
        )
        self.beat()
        plane.placement.opened(self.link)

    @property
    def _granted(self) -> int:
        return self._num_submitted + self._replica.engine.slots - self._replica.num_rows

    def beat(self) -> None:
        self.link.receive(make_beat(granted=self._granted))

    def _receive(self, frame: bytes) -> None:
        submit = wire.decode_from_gateway(frame[4:])
        assert isinstance(submit, wire.Submit) and not submit.resume_ids
        self._num_submitted += 1
        request = Request(id="", created=0, card=CARD, deadline=float("inf"))
        choice = Choice(0, request, submit.prompt_ids, submit.sampling)
        ticket = Ticket(choice, Job(request), submit.handle, 0, self._plane.now, float("inf"))
        self._replica.take(ticket, submit.sampling.max_tokens, self._plane.now)
        self._expect_end()

    def _expect_end(self) -> None:
        self._version += 1
        version, when = self._version, self._replica.next_end()
        if when is not None:
            self._plane.at(when, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        ticket = self._replica.end_first(self._plane.now)
        self._expect_end()
        handle = ticket.order
        tokens = array("I", [handle, 50] * ticket.choice.sampling.max_tokens).tobytes()  # all at once: nobody reads
        self.link.receive(wire.Step(1, tokens, [(handle, 1, -1)], [(handle, 0)], [], self._granted))


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_the_whole_data_plane_gives_the_waits_of_the_simulated_queue(num_replicas: int) -> None:
    engine = Engine(blocks=1 << 20)  # placement knows nothing of KV blocks
    trace = day(5, peak_per_s=6.0, num_failures=0, num_bursts=2, num_spikes=2, duration_s=3600.0)
    service = Service(engine=engine, max_replicas=num_replicas, min_replicas=num_replicas)
    simulated = Day(trace, service, Fixed(num_replicas), first=num_replicas).run()
    whole = Plane(num_replicas, engine).run(trace)
    assert len(trace.arrivals) > 1000 and max(whole) > 1.0, "there was a queue"
    late = sum(wait > service.slo_s for wait in whole)
    assert simulated.num_late == pytest.approx(late, rel=0.02, abs=3)
    assert sum(simulated.waits) == pytest.approx(sum(whole), rel=0.02)
