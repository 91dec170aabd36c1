"""Where choices go, in simulated time: no sockets, no event loop (C18)."""

from __future__ import annotations

import random

import pytest

from serving import wire
from serving.errors import DeadlineExceeded, GenerationTimeout, NoCapacity
from serving.gateway.link import Cause
from serving.gateway.placement import TICK_S
from serving.types import FinishReason
from tests.gateway.plane import Client
from tests.gateway.simulation import World, error_of, step_all
from tests.scripted import make_card


def test_binding_is_late_and_follows_permits() -> None:
    world = World()
    replica = world.replica(granted=2)
    clients = [world.submit() for _ in range(5)]
    assert list(replica.submits) == [0, 1]
    assert [world.placement.queue_position(client.request) for client in clients[:3]] == [None, None, (1, 30.0)]
    replica.granted = 4
    replica.beat()
    assert len(replica.submits) == 4
    other = world.replica()
    assert len(other.submits) == 1


def test_work_goes_to_the_least_loaded_and_ties_to_the_lowest_id() -> None:
    world = World()
    first, second = world.replica(), world.replica()
    world.submit(prompt=tuple(range(20, 220)))
    assert len(first.submits) == 1
    world.submit()
    assert len(second.submits) == 1
    world.submit()
    assert len(second.submits) == 2  # a long prompt that is not yet computed weighs


def test_priority_goes_first_among_those_that_wait() -> None:
    world = World()
    low, high = world.submit(priority=0), world.submit(priority=3)
    replica = world.replica(granted=1)
    assert [submit.request_id for submit in replica.submits.values()] == [high.request.id]
    assert world.placement.queue_position(low.request) == (1, 30.0)


def test_a_resume_goes_before_everything_that_waits() -> None:
    world = World()
    replica = world.replica(granted=2)
    running = [world.submit() for _ in range(2)]
    world.submit(priority=9)
    replica.say(0)
    replica.link.end(Cause.LOST)
    other = world.replica(granted=2)
    assert [submit.request_id for submit in other.submits.values()] == [client.request.id for client in running]
    assert [len(submit.resume_ids) for submit in other.submits.values()] == [4, 0]


def test_a_resume_stays_with_its_fingerprint() -> None:
    world = World()
    replica = world.replica()
    client = world.submit()
    replica.link.end(Cause.LOST)
    stranger = world.replica(card=make_card(fingerprint="f2"))
    assert stranger.submits == {}
    assert world.placement.fleet.card("tiny") == stranger.link.card
    newcomer = world.submit(card=stranger.link.card)
    assert [submit.request_id for submit in stranger.submits.values()] == [newcomer.request.id]
    twin = world.replica()
    assert [submit.request_id for submit in twin.submits.values()] == [client.request.id]


def test_a_superseded_fingerprint_is_forgotten_once_nobody_waits_for_it() -> None:
    world = World()
    for number in range(50):
        replica = world.replica(card=make_card(fingerprint=f"f{number}"))
        if number:
            world.replicas[number - 1].link.end(Cause.LOST)
    assert world.placement.fleet.cards() == [replica.link.card]
    assert len(world.placement.num_queued()) <= 1


def test_without_a_replica_a_request_is_held_and_then_refused_as_capacity() -> None:
    world = World()
    client = world.submit()
    world.pass_time(29.9)
    assert not client.is_done
    world.pass_time(0.2)
    assert isinstance(error_of(client), NoCapacity)
    assert error_of(client).reason == "no_endpoints"
    assert client.progress == [(0, 0)]
    assert world.placement.num_unfinished == 0


def test_a_restarted_replica_gets_what_was_held() -> None:
    world = World()
    world.replica().link.end(Cause.LOST)
    client = world.submit()
    world.pass_time(20.0)
    assert [submit.request_id for submit in world.replica().submits.values()] == [client.request.id]


def test_waiting_too_long_behind_others_is_a_missed_deadline() -> None:
    world = World()
    world.replica(granted=1)
    world.submit()
    client = world.submit()
    world.pass_time(30.1)
    assert isinstance(error_of(client), DeadlineExceeded)
    assert error_of(client).reason == "ttl"


@pytest.mark.parametrize("has_replica", [True, False])
def test_the_requests_own_deadline_ends_its_wait(has_replica: bool) -> None:
    world = World()
    if has_replica:
        world.replica(granted=0)
    client = world.submit(timeout_s=2.0)
    world.pass_time(1.95)
    assert not client.is_done
    world.pass_time(0.1)
    assert isinstance(error_of(client), DeadlineExceeded)


def test_a_deadline_that_passes_while_generating_is_a_timeout() -> None:
    world = World()
    replica = world.replica()
    client = world.submit(timeout_s=40.0)
    replica.say(0)
    world.pass_time(39.9)
    assert not client.is_done
    world.pass_time(0.2)
    assert isinstance(error_of(client), GenerationTimeout)
    assert replica.cancelled == [0]
    assert world.placement.num_unfinished == 0


def test_a_resumed_stream_waits_anew_for_capacity() -> None:
    world = World()
    replica = world.replica()
    client = world.submit()
    replica.say(0)
    world.pass_time(100.0)
    replica.link.end(Cause.LOST)
    world.pass_time(29.0)
    assert not client.is_done
    world.pass_time(1.2)
    assert isinstance(error_of(client), NoCapacity)


def test_a_deadline_in_the_past_is_refused_at_once() -> None:
    with pytest.raises(DeadlineExceeded):
        World().submit(timeout_s=0.0)


def test_the_queue_takes_a_request_whole_or_not_at_all() -> None:
    world = World(max_queue_len=4)
    world.replica(granted=3)
    world.submit(n=7)  # three run, four wait
    with pytest.raises(NoCapacity) as refusal:
        world.submit(n=1)
    assert refusal.value.retry_after_s == 30.0
    assert world.placement.num_unfinished == 7
    assert world.placement.counts.refused == 1


def test_silence_moves_the_rows_within_two_seconds() -> None:
    world = World()
    first, second = world.replica(), world.replica()
    client = world.submit()
    first.admit()
    first.is_beating = False
    world.pass_time(1.6)
    assert first.is_fenced and not second.is_fenced
    assert [submit.request_id for submit in second.submits.values()] == [client.request.id]
    assert client.choice.num_resumes == 1


def test_a_step_that_does_not_end_moves_the_rows() -> None:
    world = World()
    first, second = world.replica(), world.replica()
    world.submit()
    first.step_age_s = 1.6
    world.pass_time(0.1)
    assert first.is_fenced
    assert len(second.submits) == 1


def test_a_gateway_that_stood_still_does_not_blame_its_replicas() -> None:
    world = World()
    replica = world.replica()
    world.pass_time(0.1)
    world.now += 5.0
    world.placement.tick()
    assert not replica.is_fenced
    world.pass_time(3.0)
    assert not replica.is_fenced


def test_a_draining_replica_gets_nothing_new_and_keeps_its_rows() -> None:
    world = World()
    replica = world.replica()
    world.submit()
    replica.state = "draining"
    replica.beat()
    client = world.submit()
    assert len(replica.submits) == 1
    other = world.replica()
    assert len(other.submits) == 1
    replica.admit()
    replica.link.end(Cause.LOST)
    assert len(other.submits) == 2
    assert not client.is_done


@pytest.mark.parametrize("code", ["draining", "overfull", "no_capacity", "not_granted"])
def test_a_permit_taken_back_costs_the_choice_nothing(code: str) -> None:
    world = World()
    replica = world.replica()
    client = world.submit()
    replica.link.receive(wire.Reject(0, code, ""))
    assert len(replica.submits) == 1  # not again before it has spoken
    assert client.choice.num_resumes == 0
    replica.beat()
    assert len(replica.submits) == 2
    replica.link.receive(wire.Reject(1, code, ""))
    replica.is_beating = False
    replica.link.end(Cause.LOST)
    world.pass_time(30.1)
    assert isinstance(error_of(client), NoCapacity)


@pytest.mark.parametrize(
    ("code", "status"),
    [("context_length_exceeded", 400), ("request_too_large", 400), ("invalid_value", 400), ("never_heard_of", 500)],
)
def test_a_refusal_becomes_the_clients_error(code: str, status: int) -> None:
    world = World()
    replica = world.replica()
    client = world.submit()
    replica.link.receive(wire.Reject(0, code, "12 tokens of 10", "prompt"))
    error = error_of(client)
    assert (error.status, error.error_code, error.message) == (status, code, "12 tokens of 10")
    assert client.progress == [(0, 0)]
    assert world.placement.num_unfinished == 0


def test_cancel_is_idempotent_and_silent() -> None:
    world = World()
    replica = world.replica(granted=1)
    running, waiting = world.submit(), world.submit()
    for client in (running, waiting, running, waiting):
        world.placement.cancel(client.choice)
    assert replica.cancelled == [0]
    assert world.placement.num_unfinished == 0
    world.pass_time(700.0)
    assert running.progress == waiting.progress == []
    assert not running.is_done


def test_choices_that_need_no_engine_are_left_alone() -> None:
    world = World()
    replica = world.replica()
    client = Client(n=2, deadline=world.now + 10)
    client.request.choices[0].finish = FinishReason.LENGTH
    world.placement.submit(client.request)
    assert len(replica.submits) == 1


def test_closing_fails_what_is_unfinished() -> None:
    world = World()
    replica = world.replica(granted=1)
    running, waiting = world.submit(), world.submit()
    world.placement.close()
    world.placement.close()
    assert replica.is_fenced
    for client in (running, waiting):
        assert error_of(client).reason == "draining"
    with pytest.raises(NoCapacity):
        world.submit()


@pytest.mark.parametrize("seed", range(8))
def test_every_choice_ends_exactly_once_in_random_histories(seed: int) -> None:
    """Deaths, stalls, cancels, rejects and returns; nothing is lost, doubled or leaked."""
    draw = random.Random(seed)
    world = World(max_queue_len=10_000)
    clients: list[Client] = []
    cancelled: set[str] = set()
    for _ in range(400):
        action = draw.random()
        live = [replica for replica in world.replicas if not replica.is_fenced]
        if action < 0.4:
            clients.append(world.submit(n=draw.choice((1, 2, 4)), max_tokens=draw.randrange(1, 6)))
        elif action < 0.5 and len(live) < 4:
            world.replica(granted=draw.randrange(1, 20))
        elif action < 0.55 and live:
            draw.choice(live).link.end(draw.choice((Cause.LOST, Cause.FAULTY)))
        elif action < 0.65 and clients:
            client = draw.choice(clients)
            cancelled.add(client.request.id)
            for choice in client.request.choices:
                world.placement.cancel(choice)
        elif live:
            step_all(draw.choice(live))
        world.pass_time(TICK_S)
    while world.placement.num_unfinished:
        live = [replica for replica in world.replicas if not replica.is_fenced] or [world.replica()]
        for replica in live:
            step_all(replica)
    for client in clients:
        for choice in client.request.choices:
            if client.request.id not in cancelled:
                assert choice.is_done
                assert choice.error is not None or len(choice.output_ids) == choice.sampling.max_tokens
    assert sum(world.placement.num_queued().values()) == 0
    assert len(world.placement._deadlines) == 0
