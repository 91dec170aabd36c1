"""The gateway's queue: its order against a model, its bound, its measured rate, its deadlines."""

from __future__ import annotations

import random
import time

import pytest

from serving.errors import NoCapacity
from serving.gateway.deadlines import TICK_S, Deadlines
from serving.gateway.queue import DrainRate, Queue
from serving.gateway.ticket import Job, Ticket
from tests.gateway.plane import Client


def make_ticket(order: int, *, priority: int = 0, goes_first: bool = False, expires: float = 1e9) -> Ticket:
    client = Client()
    return Ticket(
        choice=client.choice,
        job=Job(client.request),
        order=order,
        priority=priority,
        enqueued_at=0.0,
        expires=expires,
        goes_first=goes_first,
    )


def make_queue(max_len: int = 1000, **options: object) -> Queue:
    return Queue(max_len, jitter=lambda: 0.5, **options)  # type: ignore[arg-type]


def expected_order(waiting: list[Ticket]) -> list[Ticket]:
    first = sorted((ticket for ticket in waiting if ticket.goes_first), key=lambda ticket: ticket.order)
    rest = sorted((ticket for ticket in waiting if not ticket.goes_first), key=lambda t: (-t.priority, t.order))
    return first + rest


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_equal_the_model(seed: int) -> None:
    draw = random.Random(seed)
    queue, waiting, popped = make_queue(), list[Ticket](), list[Ticket]()
    for order in range(600):
        action = draw.random()
        if action < 0.5:
            ticket = make_ticket(order, priority=draw.choice((0, 0, 0, 5, -3)))
            queue.push(ticket, order)
            waiting.append(ticket)
        elif action < 0.6 and popped:  # a resume: back to its place at the front
            ticket = popped.pop(draw.randrange(len(popped)))
            ticket.goes_first = True
            queue.push(ticket, order)
            waiting.append(ticket)
        elif action < 0.8 and waiting:
            ticket = queue.pop(order)
            assert ticket is expected_order(waiting)[0]
            waiting.remove(ticket)
            popped.append(ticket)
        elif waiting:
            ticket = draw.choice(waiting)
            queue.discard(ticket, order)
            waiting.remove(ticket)
        assert len(queue) == len(waiting)
        assert all(ticket.is_queued for ticket in waiting)
        for place, ticket in enumerate(expected_order(waiting), start=1):
            assert place <= queue.position(ticket) <= len(queue)
    while waiting:
        expected = expected_order(waiting)[0]
        assert queue.pop(1000) is expected
        assert not expected.is_queued
        waiting.remove(expected)
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop(1001)


def test_positions_are_exact_while_nobody_leaves_without_being_served() -> None:
    queue = make_queue()
    tickets = [make_ticket(order, priority=order % 3) for order in range(30)]
    for ticket in tickets:
        queue.push(ticket, 0.0)
    while len(queue):
        order = expected_order([ticket for ticket in tickets if ticket.is_queued])
        assert [queue.position(ticket) for ticket in order] == list(range(1, len(order) + 1))
        queue.pop(0.0)


def test_a_ticket_that_does_not_wait_cannot_be_discarded() -> None:
    queue = make_queue()
    for goes_first in (False, True):
        queue.push(make_ticket(1, goes_first=goes_first), 0.0)
        with pytest.raises(KeyError):
            queue.discard(make_ticket(2, goes_first=goes_first), 0.0)


def test_a_full_queue_refuses_with_the_numbers_and_a_time() -> None:
    queue = make_queue(max_len=10, unknown_wait_s=30.0)
    for order in range(8):
        queue.push(make_ticket(order), 0.0)
    queue.check_room(2)
    queue.check_room(3, num_permits=1)  # one of them can start now
    with pytest.raises(NoCapacity, match="8 of 10 choices are waiting and this request has 3") as refusal:
        queue.check_room(3)
    assert refusal.value.retry_after_s == 30.0
    assert refusal.value.reason == "saturated"
    for second in range(1, 5):
        queue.pop(second * 2.0)
    with pytest.raises(NoCapacity) as refusal:
        queue.check_room(7)
    assert refusal.value.retry_after_s == pytest.approx(4 / 0.5, rel=0.01)  # four wait, one leaves every two seconds


def test_retry_after_is_jittered_and_bounded() -> None:
    times = []
    draw = random.Random(1)
    queue = Queue(5, unknown_wait_s=10.0, jitter=draw.random)
    for order in range(5):
        queue.push(make_ticket(order), 0.0)
    for _ in range(50):
        with pytest.raises(NoCapacity) as refusal:
            queue.check_room(1)
        times.append(refusal.value.retry_after_s or 0.0)
    assert 7.5 <= min(times) < 8.5
    assert 11.5 < max(times) <= 12.5
    queue = make_queue(0, unknown_wait_s=3600.0)
    with pytest.raises(NoCapacity) as refusal:
        queue.check_room(1)
    assert refusal.value.retry_after_s == 30.0


def test_what_must_be_resumed_is_never_refused() -> None:
    queue = make_queue(max_len=1)
    for order in range(5):
        queue.push(make_ticket(order, goes_first=True), 0.0)
    assert len(queue) == 5


def test_the_drain_rate_knows_backlog_from_idleness() -> None:
    rate = DrainRate(window_s=10.0)
    assert rate.per_s() is None
    now = 0.0
    for _ in range(400):  # ten leave per second while there is a backlog
        now += 0.1
        rate.observe(now, True, 1)
    assert rate.per_s() == pytest.approx(10.0, rel=0.02)
    now += 1000.0  # nobody waits: capacity has not changed
    rate.observe(now, False, 0)
    assert rate.per_s() == pytest.approx(10.0, rel=0.02)
    for _ in range(100):  # then it halves
        now += 0.2
        rate.observe(now, True, 1)
    assert rate.per_s() == pytest.approx(5.0, rel=0.2)


@pytest.mark.parametrize("seed", range(10))
def test_nothing_expires_early_nor_late_nor_after_it_left(seed: int) -> None:
    draw = random.Random(seed)
    deadlines, live, now = Deadlines(), set[Ticket](), 0.0
    for order in range(2000):
        now += draw.random() * 0.01
        action = draw.random()
        if action < 0.6:
            ticket = make_ticket(order, expires=now + draw.random() * 2)
            deadlines.add(ticket)
            live.add(ticket)
        elif action < 0.7 and live:
            ticket = draw.choice(sorted(live, key=lambda t: t.order))
            deadlines.discard(ticket)
            live.discard(ticket)
        elif action < 0.8 and live:
            deadlines.move(draw.choice(sorted(live, key=lambda t: t.order)), now + draw.random() * 3)
        else:
            for ticket in deadlines.due(now):
                assert ticket.expires <= now
                live.remove(ticket)
            assert all(now < ticket.expires + TICK_S + 1e-9 for ticket in live)
        assert len(deadlines) == len(live)
    assert set(deadlines.due(now + 10)) == live
    assert len(deadlines) == 0


def test_a_ticket_without_a_deadline_waits_for_ever() -> None:
    deadlines = Deadlines()
    ticket = make_ticket(0, expires=1.0)
    deadlines.add(ticket)
    deadlines.move(ticket, float("inf"))
    assert deadlines.due(1e12) == []


def cost_us(depth: int) -> float:
    """Microseconds for one ticket to join, one to be served and one to leave, at a constant depth."""
    queue, deadlines = make_queue(max_len=1 << 30), Deadlines()
    tickets = [make_ticket(order, expires=1000.0 + order % 30) for order in range(depth + 3000)]
    for ticket in tickets[:depth]:
        queue.push(ticket, 0.0)
        deadlines.add(ticket)
    best = float("inf")
    for start in range(depth, depth + 3000, 500):
        began = time.perf_counter()
        for ticket in tickets[start : start + 500]:
            queue.push(ticket, 1.0)
            deadlines.add(ticket)
            deadlines.discard(queue.pop(1.0))
        best = min(best, time.perf_counter() - began)
    return best / 500 * 1e6


def test_the_cost_of_a_dispatch_does_not_grow_with_the_queue() -> None:
    """A scan would make it a hundred times dearer; caches may make it a little."""
    assert cost_us(30_000) < 4 * cost_us(100) + 2
