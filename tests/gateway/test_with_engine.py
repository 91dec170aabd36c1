"""The data plane against the real engine: both ends of the protocol, and resume through a real model."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serving.config import EngineSettings, GatewaySettings
from serving.engine.blocks import BlockPool
from serving.engine.server import ReplicaServer
from serving.gateway.dispatch import Dispatch
from serving.gateway.link import Cause
from serving.gateway.streams import Choice
from serving.types import NO_LOGPROBS
from tests.faults import SECRET
from tests.gateway.plane import Client, all_ready, run, until
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ReplicaServer]]:
    folder = tmp_path_factory.mktemp("engines")
    settings = EngineSettings(
        model_dir=str(tiny_model_folder(folder / "model")),
        served_model_name="tiny",
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_bytes=1 << 24,
        num_threads=1,
    )
    servers = [
        ReplicaServer(
            settings,
            replica_id=f"replica-{number}",
            secret=bytes.fromhex(SECRET),
            listen=f"unix:{folder}/s{number}",
            exits_on_failure=False,
        )
        for number in range(2)
    ]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.close()


@asynccontextmanager
async def connected(servers: list[ReplicaServer]) -> Any:
    settings = GatewaySettings(fd=-1, replicas=tuple(server.address for server in servers), secret=SECRET)
    dispatch = Dispatch(settings)
    await dispatch.start()
    try:
        await until(lambda: len(dispatch.progress()) == len(servers))
        await all_ready(dispatch)
        yield dispatch
    finally:
        await dispatch.close()


def make_clients(dispatch: Dispatch, seed: int, count: int = 16) -> list[Client]:
    card = dispatch.card("tiny")
    assert card is not None
    draw = random.Random(seed)
    return [
        Client(
            card=card,
            prompt=tuple(draw.randrange(3, card.tokenizer_size) for _ in range(draw.randrange(1, 60))),
            n=draw.choice((1, 1, 2)),
            seed=draw.randrange(1 << 64),
            max_tokens=draw.randrange(1, 70),
            logprobs=draw.choice((NO_LOGPROBS, 0, 5)),
            ignore_eos=draw.choice((True, False)),
        )
        for _ in range(count)
    ]


def journals(clients: list[Client]) -> list[Any]:
    return [
        (list(choice.output_ids), choice.logprobs, choice.finish, choice.stop_token_id, choice.error)
        for client in clients
        for choice in client.request.choices
    ]


async def journals_of_a_run(dispatch: Dispatch, seed: int) -> list[Any]:
    clients = make_clients(dispatch, seed)
    for client in clients:
        dispatch.submit(client.request)
    for client in clients:
        await client.done(30)
    return journals(clients)


def test_broken_connections_change_no_byte(servers: list[ReplicaServer]) -> None:
    async def scenario() -> None:
        async with connected(servers) as dispatch:
            for seed in range(3):
                expected = await journals_of_a_run(dispatch, seed)
                clients = make_clients(dispatch, seed)
                for client in clients:
                    dispatch.submit(client.request)
                num_tokens = sum(len(journal[0]) for journal in expected)
                for share in (0.1, 0.3, 0.6):
                    await until(lambda: sum(client.num_tokens for client in clients) > num_tokens * share)  # noqa: B023
                    for link in dispatch._fleet.all_links():
                        link.end(Cause.LOST, "cut by the test")
                for client in clients:
                    await client.done(30)
                assert journals(clients) == expected
                assert sum(choice.num_resumes for client in clients for choice in client.request.choices) > 10
                await all_ready(dispatch)

    run(scenario())


def test_the_account_of_every_choice_adds_up(tmp_path: Path) -> None:
    """A cache too small for all, so that rows wait and are preempted; prompts that are cut into chunks."""
    settings = EngineSettings(
        model_dir=str(tiny_model_folder(tmp_path / "model")),
        served_model_name="tiny",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        kv_cache_bytes=1 << 20,
        num_threads=1,
    )
    server = ReplicaServer(
        settings,
        replica_id="replica-0",
        secret=bytes.fromhex(SECRET),
        listen=f"unix:{tmp_path}/s",
        exits_on_failure=False,
    )
    server.start()
    scheduler = server.core.scheduler
    scheduler.pool = BlockPool(24)  # less than any size in bytes would give

    async def scenario() -> list[Choice]:
        async with connected([server]) as dispatch:
            clients = make_clients(dispatch, seed=11, count=24)
            for client in clients:
                dispatch.submit(client.request)
            for client in clients:
                await client.done(60)
            return [choice for client in clients for choice in client.request.choices]

    try:
        choices = asyncio.run(scenario())
    finally:
        server.close()
    waits, preemptions = Counter[str](), 0
    for choice in choices:
        life = choice.life
        life.finish(max(event.until for event in life.events), "length", life.num_tokens)
        assert life.num_events_left_out == 0
        told = {kind: [event for event in life.events if event.kind == kind] for kind in KINDS}
        assert sum(map(len, told.values())) == len(life.events), "a kind that nobody knows"
        between = sum(int(event.detail.get("gaps", 1)) - 1 for event in told["gap"])
        assert sum(int(event.detail["tokens"]) for event in told["decode"]) + between == len(choice.output_ids)
        assert life.num_tokens == len(choice.output_ids)
        assert [event.detail["cached_tokens"] for event in told["admitted"]] == [choice.cached_tokens]
        computed = sum(int(event.detail["tokens"]) for event in told["chunk"])
        if not life.num_preemptions:
            assert 0 <= len(choice.prompt_ids) // 4 - (choice.cached_tokens or 0) - computed <= 2
        waits.update(str(event.detail["why"]) for event in told["waited"])
        preemptions += life.num_preemptions
        starts = [event.at for event in sorted(life.events, key=lambda event: event.until)]
        assert min(starts) == life.events[0].at
    assert preemptions == scheduler.tally.num_preemptions > 0
    assert waits["blocks"] and set(waits) <= {"slots", "blocks", "budget", "prefix"}


KINDS = ("queued", "sent", "waited", "admitted", "chunk", "decode", "gap", "preempted", "finished")


def test_the_engine_and_the_gateway_agree_on_files_and_permits(servers: list[ReplicaServer]) -> None:
    async def scenario() -> None:
        async with connected(servers) as dispatch:
            card = dispatch.card("tiny")
            assert card is not None and "tokenizer.json" in card.assets
            path = await dispatch.asset(card, "tokenizer.json")
            assert path.read_bytes() == (Path(servers[0].settings.model_dir) / "tokenizer.json").read_bytes()
            await until(lambda: dispatch.is_ready()[0])
            await journals_of_a_run(dispatch, seed=9)
            assert dispatch.counts.rejected == 0
            assert dispatch.counts.links_ended == {}

    run(scenario())


def test_a_cancelled_row_frees_its_blocks(servers: list[ReplicaServer]) -> None:
    async def scenario() -> None:
        async with connected(servers) as dispatch:
            clients = make_clients(dispatch, seed=4)
            for client in clients:
                dispatch.submit(client.request)
            await until(lambda: sum(client.num_tokens for client in clients) > 40)
            for client in clients:
                for choice in client.request.choices:
                    dispatch.cancel(choice)
            await asyncio.sleep(0)
            schedulers = [server.core.scheduler for server in servers]
            await until(lambda: not any(s.num_running or s.num_waiting or s.pool.num_owned for s in schedulers), 2.0)

    run(scenario())


def test_an_impossible_choice_is_refused_with_the_engines_words(servers: list[ReplicaServer]) -> None:
    async def scenario() -> None:
        async with connected(servers) as dispatch:
            card = dispatch.card("tiny")
            assert card is not None
            client = Client(card=card, prompt=(5,) * 256)
            dispatch.submit(client.request)
            await client.done()
            error = client.choice.error
            assert error is not None
            assert (error.status, error.error_code, error.param) == (400, "context_length_exceeded", "prompt")

    run(scenario())
