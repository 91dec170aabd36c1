"""Placement in simulated time: replicas by hand, no sockets, no event loop (C18)."""

from __future__ import annotations

from array import array
from typing import Any

from serving import wire
from serving.errors import ArgosyError
from serving.gateway.link import Link
from serving.gateway.placement import TICK_S, Placement
from serving.types import ModelCard
from tests.gateway.plane import CARD, Client
from tests.gateway.test_pulse import make_beat


class SimulatedReplica:
    """Beats and steps by hand; sees the frames that it is sent."""

    def __init__(self, world: World, name: str, card: ModelCard, granted: int) -> None:
        self.world = world
        self.submits: dict[int, wire.Submit] = {}
        self.cancelled: list[int] = []
        self.is_fenced = False
        self.link = Link(
            wire.HelloReply(1, card, 1, name, b"", b""),
            world.placement,
            write=self._receive,
            abort=self._fence,
            defer=lambda function: function(),
            clock=lambda: world.now,
        )
        self.state = "ready"
        self.granted = granted
        self.step_age_s = 0.0
        self.is_beating = True
        self.beat()
        world.placement.opened(self.link)

    def _receive(self, frame: bytes) -> None:
        message = wire.decode_from_gateway(frame[4:])
        if isinstance(message, wire.Submit):
            self.submits[message.handle] = message
        elif isinstance(message, wire.Cancel):
            self.cancelled += message.handles

    def _fence(self) -> None:
        self.is_fenced = True

    def beat(self) -> None:
        self.link.receive(make_beat(state=self.state, granted=self.granted, step_age_s=self.step_age_s))

    def admit(self, *handles: int) -> None:
        self.link.receive(wire.Step(1, b"", [], [(handle, 0) for handle in handles or self.submits], [], 0))

    def say(self, handle: int, token: int = 50) -> None:
        self.link.receive(wire.Step(1, array("I", [handle, token]).tobytes(), [], [(handle, 0)], [], 0))


class World:
    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.replicas: list[SimulatedReplica] = []
        self.placement = Placement(
            **{"max_queue_len": 100, "queue_timeout_s": 30.0, **options},
            clock=lambda: self.now,
            jitter=lambda: 0.5,
        )

    def replica(self, *, card: ModelCard = CARD, granted: int = 100) -> SimulatedReplica:
        replica = SimulatedReplica(self, f"replica-{len(self.replicas)}", card, granted)
        self.replicas.append(replica)
        return replica

    def submit(self, timeout_s: float = 600.0, **request: Any) -> Client:
        client = Client(deadline=self.now + timeout_s, **request)
        self.placement.submit(client.request)
        return client

    def pass_time(self, seconds: float) -> None:
        """Ticks and beats as they come."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            for replica in self.replicas:
                if replica.is_beating and not replica.is_fenced:
                    replica.beat()
            self.placement.tick()


def step_all(replica: SimulatedReplica) -> None:
    """One token for every live row, ends included."""
    rows = list(replica.link._rows.values())
    pairs = array("I", [number for ticket in rows for number in (ticket.handle, 50)])
    ends = [
        (ticket.handle, 1, -1)
        for ticket in rows
        if len(ticket.choice.output_ids) + 1 == ticket.choice.sampling.max_tokens
    ]
    replica.granted = len(replica.submits) + 10
    admitted = [(ticket.handle, 0) for ticket in rows]
    replica.link.receive(wire.Step(1, pairs.tobytes(), ends, admitted, [], replica.granted))


def error_of(client: Client) -> ArgosyError:
    error = client.choice.error
    assert error is not None
    return error
