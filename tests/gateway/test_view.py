"""What the data plane shows of itself: replicas, queues, faults, and where a request's time went."""

from __future__ import annotations

import asyncio

from serving.errors import EngineError
from serving.gateway.link import Cause
from serving.gateway.placement import Placement
from serving.gateway.view import MAX_NAME, view_of
from serving.wire import Reject
from tests.gateway.plane import Client, plane, run, until


def test_replicas_and_queues_as_they_are() -> None:
    async def test() -> None:
        async with plane(2, max_rows=1, step_s=0.02) as (dispatch, _):
            clients = [Client(prompt=(11,) * 7, max_tokens=30) for _ in range(5)]
            for client in clients:
                dispatch.submit(client.request)
            view = dispatch.view()
            (model,) = view.models
            assert view.queued == {model: (3, 21)}
            assert view.replica_states == {"ready": 2}
            assert sorted(replica.id for replica in view.replicas) == ["replica-0", "replica-1"]
            assert all(replica.model == model and replica.stats is None for replica in view.replicas)
            await asyncio.gather(*(client.done() for client in clients))
            assert dispatch.view().queued == {model: (0, 0)}
            for client in clients[:2]:
                assert client.request.queued_at == client.request.started_at
            for client in clients[2:]:
                queued, started = client.request.queued_at, client.request.started_at
                assert queued is not None and started is not None and started > queued

    run(test())


def test_cancelled_choices_leave_no_tokens_in_the_queue() -> None:
    async def test() -> None:
        async with plane(1, max_rows=1, step_s=0.02) as (dispatch, _):
            clients = [Client(prompt=(11,) * 5, n=2) for _ in range(3)]
            for client in clients:
                dispatch.submit(client.request)
            for client in clients:
                for choice in client.request.choices:
                    dispatch.cancel(choice)
            ((choices, tokens),) = dispatch.view().queued.values()
            assert (choices, tokens) == (0, 0)

    run(test())


def test_a_replica_that_dies_is_a_fault_and_one_that_drains_is_none() -> None:
    async def test() -> None:
        async with plane(2, step_s=0.01) as (dispatch, (first, second)):
            client = Client(max_tokens=60)
            dispatch.submit(client.request)
            await until(lambda: client.num_tokens > 3)
            victim, other = (first, second) if first.num_tokens else (second, first)
            victim.kill()
            await client.done()
            view = dispatch.view()
            assert view.faults == {"replica_lost": 1}
            assert view.links_ended == {Cause.LOST: 1}
            assert view.replica_states == {"ready": 1, "down": 1}
            assert client.choice.num_resumes == 1
            other.state = "draining"
            await until(lambda: dispatch.view().replica_states.get("draining") == 1)
            other.kill()
            await until(lambda: dispatch.view().links_ended == {Cause.LOST: 2})
            assert dispatch.view().faults == {"replica_lost": 1}

    run(test())


def test_unusable_numbers_are_faults_of_the_engine_and_at_last_of_the_request() -> None:
    async def test() -> None:
        async with plane(1) as (dispatch, (replica,)):
            replica.reject_with = Reject(0, "engine_fault", "no numbers")
            client = Client()
            dispatch.submit(client.request)
            await client.done()
            assert isinstance(client.choice.error, EngineError)
            assert dispatch.view().faults == {"engine_fault": 3, "poisonous_request": 1}

    run(test())


def test_the_loops_lag_is_observed_at_every_tick() -> None:
    now = 100.0
    placement = Placement(max_queue_len=1, queue_timeout_s=1.0, clock=lambda: now)
    for late_s in (0.0, 0.004, 0.3):
        now += 0.05 + late_s
        placement.tick()
    lag = view_of(placement, now).loop_lag
    assert lag.count == 3
    assert abs(lag.sum - 0.304) < 1e-6


def test_a_name_is_shown_in_part_and_once() -> None:
    async def test() -> None:
        async with plane(2) as (dispatch, replicas):
            for replica in replicas:
                replica.name = "x" * 200
                replica.break_connections()
            await until(lambda: len(dispatch.view().replicas) == 1)
            await until(lambda: dispatch.view().replica_states.get("ready") == 2)
            (shown,) = dispatch.view().replicas
            assert shown.id == "x" * MAX_NAME

    run(test())
