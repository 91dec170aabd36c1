"""A request that kills its replicas is stopped; those that died beside it are not (D7)."""

from __future__ import annotations

from serving import wire
from serving.gateway.link import Cause
from tests.gateway.simulation import World, error_of


def test_unusable_logits_are_tried_elsewhere_and_not_for_ever() -> None:
    world = World()
    replicas = [world.replica(), world.replica()]
    client = world.submit()
    for attempt in range(3):
        holder = next(replica for replica in replicas if replica.link.num_rows)
        handle = max(holder.submits)
        holder.link.receive(wire.Reject(handle, "engine_fault", "The model computed NaN."))
        assert client.is_done == (attempt == 2)
    assert error_of(client).error_code == "engine_error"
    assert str(error_of(client)).endswith("The model computed NaN."), "the client hears why"


def test_three_deaths_without_progress_convict() -> None:
    world = World()
    client = world.submit(n=2)
    for _ in range(3):
        assert not client.is_done
        replica = world.replica()
        replica.admit()
        replica.link.end(Cause.LOST)
    assert all(choice.error and choice.error.error_code == "engine_error" for choice in client.request.choices)


def test_deaths_of_a_stream_that_progresses_are_not_its_own() -> None:
    world = World()
    client = world.submit(max_tokens=4000)
    for tokens in (1, 1, 20, 1, 1, 1, 20) * 10:
        replica = world.replica()
        for _ in range(tokens):
            replica.say(0)
        replica.link.end(Cause.LOST)
    assert not client.is_done
    assert client.num_tokens == 450


def test_a_request_that_kills_after_every_token_is_stopped_as_well() -> None:
    world = World()
    client = world.submit(max_tokens=4000)
    while not client.is_done:
        replica = world.replica()
        replica.say(0)
        replica.link.end(Cause.LOST)
    assert client.num_tokens == 32
    assert error_of(client).error_code == "engine_error"


def test_rows_that_never_ran_and_rows_of_a_drained_replica_count_no_death() -> None:
    world = World()
    client = world.submit()
    for number in range(10):
        replica = world.replica()
        if number % 2:
            replica.admit()
            replica.state = "draining"
            replica.beat()
        replica.link.end(Cause.LOST)
    assert not client.is_done


def test_a_suspect_runs_apart_from_newcomers_until_it_progresses() -> None:
    world = World()
    suspect = world.submit()
    for _ in range(2):
        replica = world.replica()
        replica.admit()
        replica.link.end(Cause.LOST)
    replica = world.replica()
    innocent = world.submit()
    assert [submit.request_id for submit in replica.submits.values()] == [suspect.request.id]
    replica.say(0)
    assert [submit.request_id for submit in replica.submits.values()] == [suspect.request.id, innocent.request.id]


def test_a_cancelled_suspect_makes_room() -> None:
    world = World()
    suspect = world.submit()
    for _ in range(2):
        replica = world.replica()
        replica.admit()
        replica.link.end(Cause.LOST)
    replica = world.replica()
    world.submit()
    world.placement.cancel(suspect.choice)
    replica.beat()
    assert len(replica.submits) == 2
