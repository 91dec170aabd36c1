"""A choice outlives its replicas: journals equal to the undisturbed run's, whatever breaks (C1, C2, C13)."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from serving.gateway.dispatch import Dispatch
from serving.types import FinishReason
from tests.faults import FakeReplica
from tests.gateway.plane import Client, all_ready, assert_undisturbed, mixed_clients, plane, run, until


async def finish_all(dispatch: Dispatch, clients: list[Client]) -> None:
    for client in clients:
        dispatch.submit(client.request)
    for client in clients:
        await client.done()
        assert_undisturbed(client)
        lengths: dict[int, int] = {}
        for index, length in client.progress:
            assert length >= lengths.get(index, 0)
            lengths[index] = length
    assert dispatch.num_unfinished == 0


def test_sixteen_mixed_streams_without_a_fault() -> None:
    async def scenario() -> None:
        async with plane(2) as (dispatch, replicas):
            await finish_all(dispatch, mixed_clients(seed=0))
            assert all(replica.submits for replica in replicas)
            assert dispatch.counts.resumed == 0

    run(scenario())


@pytest.mark.parametrize("cut_inside_frame", [False, True])
def test_a_connection_cut_at_many_positions(cut_inside_frame: bool) -> None:
    async def scenario() -> None:
        async with plane(2, step_s=0.0002) as (dispatch, replicas):
            for position in [1, 2, 3, 5, 8, 13, 16, 17, 18, 29, 47, 76, 101, 123, 160, 199, 233, 250]:
                await all_ready(dispatch)
                victim = replicas[position % 2]
                victim.cut_at, victim.cut_inside_frame = victim.num_tokens + position, cut_inside_frame
                num_cuts = victim.num_cuts
                await finish_all(dispatch, mixed_clients(seed=position))
                assert victim.num_cuts == num_cuts + 1, f"no cut at {position}"
            assert dispatch.counts.resumed > 100

    run(scenario())


def test_the_only_replica_dies_and_comes_back() -> None:
    async def scenario() -> None:
        async with plane(1) as (dispatch, (replica,)):
            replica.cut_at, replica.down_s = 100, 0.2
            clients = mixed_clients(seed=3)
            await finish_all(dispatch, clients)
            assert replica.num_cuts == 1
            assert sum(choice.num_resumes for client in clients for choice in client.request.choices) > 5
            assert dispatch.card("tiny") is not None

    run(scenario())


def test_the_resume_target_dies_too() -> None:
    """Double and triple faults at random moments, among them the prefill of a resume."""

    async def scenario() -> None:
        async with plane(3, step_s=0.0005) as (dispatch, replicas):
            for seed in range(20):
                await all_ready(dispatch)
                draw = random.Random(seed)
                clients = mixed_clients(seed, 12)
                for victim in draw.sample(replicas, 2):
                    victim.cut_at = victim.num_tokens + draw.randrange(1, 60)
                await finish_all(dispatch, clients)
                for replica in replicas:
                    replica.cut_at = None
            assert sum(replica.num_cuts for replica in replicas) > 25

    run(scenario())


async def gap_after(dispatch: Dispatch, replicas: list[FakeReplica], fault: str) -> tuple[float, Client]:
    """Seconds until a stream goes on after `fault` has hit its replica."""
    client = Client(max_tokens=4000)
    dispatch.submit(client.request)
    await until(lambda: client.num_tokens > 20)
    victim = next(replica for replica in replicas if replica.num_rows)
    getattr(victim, fault)()
    await asyncio.sleep(0.01)  # what was on its way
    length, began = client.num_tokens, time.monotonic()
    await until(lambda: client.num_tokens > length)
    gap_s = time.monotonic() - began
    if fault == "freeze":
        before = list(client.choice.output_ids)
        victim.thaw()  # the zombie writes; its connection is gone
        await asyncio.sleep(0.05)
        assert list(client.choice.output_ids)[: len(before)] == before
    victim.is_stuck = victim.is_silent = False
    for replica in replicas:
        replica.step_s = 0.0
    return gap_s, client


@pytest.mark.parametrize("fault", ["freeze", "stick", "mute", "kill"])
def test_a_stalled_replica_is_left_within_two_seconds(fault: str) -> None:
    async def scenario() -> None:
        async with plane(2, step_s=0.005) as (dispatch, replicas):
            gap_s, client = await gap_after(dispatch, replicas, fault)
            assert gap_s < 2.0
            assert client.choice.num_resumes == 1
            await client.done(20)
            assert_undisturbed(client)
            causes = dispatch.counts.links_ended
            assert causes == ({"lost": 1} if fault == "kill" else {"stalled": 1})

    run(scenario())


def test_a_complete_journal_is_never_resubmitted() -> None:
    """The replica dies between the last token and the word that it was the last."""

    async def scenario() -> None:
        async with plane(2) as (dispatch, replicas):
            for replica in replicas:
                replica.forgets_ends = True
            by_length = Client(max_tokens=5)
            by_stop = Client(prompt=(40,), max_tokens=400, ignore_eos=False)
            unfinished = Client(max_tokens=4000)
            for client in (by_length, by_stop, unfinished):
                dispatch.submit(client.request)
            await until(lambda: unfinished.num_tokens > 401)
            for replica in replicas:
                replica.forgets_ends = False
                replica.step_s = 0.0
                replica.break_connections()
            await unfinished.done(20)
            for client in (by_length, by_stop, unfinished):
                assert_undisturbed(client)
            assert by_length.choice.finish is FinishReason.LENGTH
            assert by_stop.choice.finish is FinishReason.STOP
            assert sum(len(replica.submits) for replica in replicas) == 4

    run(scenario())


def test_a_poisonous_request_is_convicted_and_nobody_else() -> None:
    async def scenario() -> None:
        async with plane(2, step_s=0.003) as (dispatch, replicas):
            for replica in replicas:
                replica.poison = 299
            innocents = mixed_clients(seed=5, count=12)
            for client in innocents:
                for choice in client.request.choices:
                    choice.prompt_ids = choice.prompt_ids.replace(b"\x2b\x01\0\0", b"\x2a\x01\0\0")
            poison = Client(prompt=(20, 299), n=2)
            for client in [*innocents[:6], poison, *innocents[6:]]:
                dispatch.submit(client.request)
            await poison.done(20)
            errors = [choice.error for choice in poison.request.choices]
            assert {error.error_code for error in errors if error} == {"engine_error"}
            assert None not in errors
            for client in innocents:
                await client.done()
                assert_undisturbed(client)
            assert 3 <= sum(replica.num_cuts for replica in replicas) <= 4  # its two choices may run at once
            assert dispatch.num_unfinished == 0

    run(scenario())


def test_garbage_never_reaches_a_journal() -> None:
    async def scenario() -> None:
        def foreign_token(step):  # type: ignore[no-untyped-def]
            step.tokens = step.tokens[:-4] + (300).to_bytes(4, "little")
            return step

        def foreign_handle(step):  # type: ignore[no-untyped-def]
            step.tokens += b"\xff" * 4 + b"\0" * 4
            return step

        def half_a_pair(step):  # type: ignore[no-untyped-def]
            step.tokens += b"\0" * 4
            return step

        def no_frame(step):  # type: ignore[no-untyped-def]
            return b"\x05\0\0\0hello"

        def oversized(step):  # type: ignore[no-untyped-def]
            return b"\xff\xff\xff\xff"

        faults = [foreign_token, foreign_handle, half_a_pair, no_frame, oversized]
        for fault in faults:
            async with plane(2) as (dispatch, replicas):
                clients = mixed_clients(seed=9, count=8)
                for client in clients:
                    dispatch.submit(client.request)
                await until(lambda: sum(client.num_tokens for client in clients) > 20)  # noqa: B023
                replicas[0].corrupt = fault
                for client in clients:
                    await client.done()
                    assert_undisturbed(client)
                assert dispatch.counts.links_ended == {"faulty": 1}, fault.__name__

    run(scenario())
