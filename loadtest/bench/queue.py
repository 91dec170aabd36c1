"""What a deep queue costs the gateway: the same operations with 100 and with 100,000 choices waiting.

Operations: push, pop, discard and expiry on the queue and the wheel of deadlines, without anything else. Steps: the
whole data plane of a gateway without sockets (placement, queue, deadlines, one link), driven by steps of 256 rows in
each of which 8 rows end and 8 start, 1 client leaves and 1 expires while they wait, and 10 arrive. Depths are
interleaved; the limit is the cost at the first depth, which no step at another should exceed by more than 5 %. Single
operations may: none of them does more work, but a deep queue does not fit into the processor's caches.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from array import array
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from loadtest.bench._report import line, report
from serving import wire
from serving.gateway.deadlines import TICK_S, Deadlines
from serving.gateway.link import Link
from serving.gateway.placement import Placement
from serving.gateway.queue import Queue
from serving.gateway.streams import Choice, Request
from serving.gateway.ticket import Job, Ticket
from serving.types import FinishReason, ModelCard, RankState, SamplingParams

T = TypeVar("T")

TARGET = 1.05
BLOCK = 32
OPERATIONS = ("push", "pop", "discard", "expiry")
NUM_ROWS = 256
ENDING = 8
LEAVING = 1
EXPIRING = 1
STEP_S = TICK_S
FAR = 1e6
TAG_AT = wire.HEADER.size + 1  # behind msgpack's array header
SUBMIT_TAG = wire.Submit.__struct_config__.tag
MAX_TOKENS = NUM_ROWS // ENDING
CARD = ModelCard(
    fingerprint="bench",
    model="bench",
    max_model_len=1 << 20,
    max_num_seqs=NUM_ROWS,
    logits_size=1000,
    tokenizer_size=1000,
    eos_ids=(0,),
    bos_id=None,
    block_size=16,
    determinism="exact",
    assets={},
)
PROMPT = wire.pack_ids(range(1, 129))
SAMPLING = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench queue", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--blocks", type=int, default=300, help=f"of {BLOCK} operations of each kind, per repetition")
    parser.add_argument("--steps", type=int, default=500, help="per repetition")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(argv)
    if min(options.depths) < 2 * BLOCK:
        parser.error(f"--depths {min(options.depths)}: at least {2 * BLOCK}")
    measured: dict[str, dict[int, list[float]]] = {}
    for kind, world, count in (("operation", Waiting, options.blocks), ("step", Plane, options.steps)):
        worlds: dict[int, Any] = {depth: world(depth) for depth in options.depths}
        for repetition in range(options.repeat + 1):
            for depth in options.depths:
                for name, cost in worlds[depth].measure(count).items():
                    if repetition:  # the first one warms up
                        measured.setdefault(f"{kind} {name}".strip(), {}).setdefault(depth, []).append(cost)
    rows, lines = [], []
    for name, by_depth in measured.items():
        base = statistics.median(by_depth[options.depths[0]])
        for depth, costs in by_depth.items():
            value = statistics.median(costs)
            ratio = value / base
            rows.append([name, f"{depth:,}", f"{value:.2f}", f"{min(costs):.2f}–{max(costs):.2f}", f"{ratio:.3f}"])
            lines.append(
                line(
                    bench=f"queue {name} at {depth}",
                    shape=f"{depth} choices waiting",
                    fmt="gateway",
                    value=round(value, 3),
                    unit="us/step" if name.startswith("step") else "us/operation",
                    min=round(min(costs), 3),
                    max=round(max(costs), 3),
                    limit=round(base, 3),
                    fraction=round(base / value, 3),
                    ratio=round(ratio, 3),
                    **({"target": TARGET} if name.startswith("step") else {}),
                    ceilings={f"us_at_depth_{options.depths[0]}": round(base, 3)},
                    n=options.repeat,
                )
            )
    report("gateway queue", ["what", "waiting", "µs", "min–max", "ratio"], rows, lines)
    return 0


class Waiting:
    """A queue and its deadlines, kept at one depth."""

    def __init__(self, depth: int) -> None:
        self._draw: Draw[Ticket] = Draw(lambda ticket: ticket.is_queued)
        self._orders = itertools.count()
        self._now = 1000.0
        self._queue = Queue(max_len=depth)
        self._deadlines = Deadlines()
        self._job = Job(Request(id="bench", created=0, card=CARD, deadline=FAR))
        self._join(self._make(depth, FAR))

    def measure(self, num_blocks: int) -> dict[str, float]:
        """Median µs of one operation, by name."""
        times: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        for _ in range(num_blocks):
            self._now += TICK_S
            times["push"].append(_timed(self._join, self._make(BLOCK, FAR)))
            times["discard"].append(_timed(self._leave, [self._draw() for _ in range(BLOCK)]))
            self._join(self._make(BLOCK, self._now))
            self._now += 2 * TICK_S
            times["expiry"].append(_timed(self._expire))
            self._join(self._make(BLOCK, FAR))
            times["pop"].append(_timed(self._pop))
        return {name: statistics.median(values) / BLOCK for name, values in times.items()}

    def _make(self, count: int, expires: float) -> list[Ticket]:
        """Tickets that wait nowhere yet; those that may leave again can be drawn."""
        tickets = []
        for _ in range(count):
            choice = Choice(0, self._job.request, PROMPT, SAMPLING)
            ticket = Ticket(choice, self._job, next(self._orders), 0, enqueued_at=self._now, expires=expires)
            tickets.append(ticket)
        if expires == FAR:
            self._draw.items += tickets
        return tickets

    def _join(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._deadlines.add(ticket)
            self._queue.push(ticket, self._now)

    def _pop(self) -> None:
        for _ in range(BLOCK):
            self._deadlines.discard(self._queue.pop(self._now))

    def _leave(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._deadlines.discard(ticket)
            self._queue.discard(ticket, self._now)

    def _expire(self) -> None:
        expired = self._deadlines.due(self._now)
        for ticket in expired:
            self._queue.discard(ticket, self._now)
        assert len(expired) == BLOCK, f"{len(expired)} of {BLOCK} expired"


class Plane:
    """A gateway's data plane in simulated time: every row of one full replica runs, `depth` choices wait."""

    def __init__(self, depth: int) -> None:
        self._draw: Draw[Request] = Draw(self._can_leave)
        self._depth = depth
        self._now = 1000.0
        self._num_requests = 0
        self._num_submits = 0
        self._num_steps = 0
        self._left: dict[int, int] = {}  # handle -> tokens that its row still says
        self._placement = Placement(
            max_queue_len=depth + 2 * NUM_ROWS, queue_timeout_s=FAR, clock=lambda: self._now, jitter=lambda: 0.5
        )
        self._link = Link(
            wire.HelloReply(wire.PROTOCOL_VERSION, CARD, 1, "bench", b"", b""),
            self._placement,
            write=self._sent,
            abort=lambda: None,
            defer=lambda function: function(),
            clock=lambda: self._now,
        )
        self._placement.opened(self._link)
        self._beat()
        while self._num_submits < NUM_ROWS:  # a few at a time: their ends are spread over the steps
            self._arrive([self._make(FAR) for _ in range(ENDING)])
            self._link.receive(self._next_step(ENDING if self._num_submits < NUM_ROWS else 0))
        while self._num_waiting < depth:
            self._arrive([self._make(FAR)])

    def _can_leave(self, request: Request) -> bool:
        """Whether it waits, and will not start with the next step."""
        position = self._placement.queue_position(request)
        return position is not None and position[0] > 2 * ENDING

    @property
    def _num_waiting(self) -> int:
        return self._placement.num_queued()[CARD.fingerprint]

    def measure(self, num_steps: int) -> dict[str, float]:
        """Median and mean µs of one step: the mean holds the garbage collector's share."""
        times = []
        for _ in range(num_steps):
            self._now += STEP_S
            self._beat()
            comers = [self._make(FAR) for _ in range(ENDING + LEAVING)]
            comers += [self._make(self._now + STEP_S) for _ in range(EXPIRING)]
            leavers = [self._draw() for _ in range(LEAVING)]
            times.append(_timed(self._step, self._next_step(0), comers, leavers))
        assert abs(self._num_waiting - self._depth) <= 4 * EXPIRING, f"{self._num_waiting} of {self._depth} wait"
        return {"median": statistics.median(times), "mean": statistics.fmean(times)}

    def _step(self, step: wire.Step, comers: list[Request], leavers: list[Request]) -> None:
        self._link.receive(step)
        for request in leavers:
            self._placement.cancel(request.choices[0])
        self._arrive(comers)
        self._placement.tick()

    def _arrive(self, requests: list[Request]) -> None:
        for request in requests:
            self._placement.submit(request)

    def _make(self, deadline: float) -> Request:
        self._num_requests += 1
        request = Request(id=f"r{self._num_requests}", created=0, card=CARD, deadline=deadline)
        request.choices.append(Choice(0, request, PROMPT, SAMPLING))
        if deadline == FAR:
            self._draw.items.append(request)
        return request

    def _sent(self, frame: bytes) -> None:
        if frame[TAG_AT] == SUBMIT_TAG:  # decoding it would be the replica's cost
            self._left[self._num_submits] = MAX_TOKENS
            self._num_submits += 1

    def _next_step(self, num_more: int) -> wire.Step:
        """A token of every row, and permits for as many as end and `num_more`."""
        self._num_steps += 1
        pairs = array("I")
        finished = []
        for handle in self._left:
            pairs.extend((handle, 1 + handle % 900))
            self._left[handle] -= 1
            if not self._left[handle]:
                finished.append((handle, int(FinishReason.LENGTH), -1))
        for handle, _, _ in finished:
            del self._left[handle]
        granted = self._num_submits + len(finished) + num_more
        return wire.Step(self._num_steps, pairs.tobytes(), finished, [], [], min(granted, self._num_submits + NUM_ROWS))

    def _beat(self) -> None:
        self._link.receive(
            wire.Beat(
                seq=self._num_steps,
                state="ready",
                step=self._num_steps,
                step_age_s=0.0,
                announced_s=0.05,
                num_running=len(self._left),
                num_waiting=0,
                blocks_used=0,
                blocks_total=1,
                granted=self._num_submits if self._num_submits else ENDING,
                ranks=[RankState(rank=0, host="localhost", pid=1, step=self._num_steps, age_s=0.0)],
            )
        )


class Draw(Generic[T]):
    """Draws without replacement among `items`, of those that are still waiting."""

    def __init__(self, is_waiting: Callable[[T], bool]) -> None:
        self.items: list[T] = []
        self._is_waiting = is_waiting
        self._rng = random.Random(0)

    def __call__(self) -> T:
        items = self.items
        while True:
            at = self._rng.randrange(len(items))
            items[at], items[-1] = items[-1], items[at]
            item = items.pop()
            if self._is_waiting(item):
                return item


def _timed(function: Callable[..., object], *arguments: object) -> float:
    """µs of one call."""
    begun = time.perf_counter_ns()
    function(*arguments)
    return (time.perf_counter_ns() - begun) / 1e3
