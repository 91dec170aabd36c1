"""The gateway's side of scaling from zero, with a real directory behind real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.config import GatewaySettings
from serving.deployments.directory import Directory
from serving.errors import NoCapacity
from serving.gateway.dispatch import Dispatch
from tests.gateway.plane import CARD, Client
from tests.gateway.simulation import World, error_of
from tests.gateway.world import MODEL, a_world

SECRET = "5e" * 32


@contextlib.asynccontextmanager
async def serving(directory: Directory) -> AsyncIterator[str]:
    """The directory's URL."""

    async def answer(request: Request) -> Response:
        return await directory(request)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = Starlette(routes=[Route("/directory{path:path}", answer, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/directory"
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    begun = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return time.monotonic() - begun


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


def test_what_a_gateway_holds_wakes_a_replica_within_a_second(secret_file: Path) -> None:
    opened = []

    async def wake() -> None:
        opened.append(time.monotonic())
        await asyncio.Event().wait()

    async def scenario() -> None:
        directory = Directory(secret_file=str(secret_file), wake=wake)
        async with serving(directory) as url:
            settings = GatewaySettings(
                fd=-1, directory_url=url, secret=SECRET, served_model_name=CARD.model, can_wake=True
            )
            dispatch = Dispatch(settings)
            await dispatch.start()
            try:
                assert not dispatch.is_ready()[0], "nobody has answered yet"
                await until(lambda: dispatch.is_ready()[0])
                assert not opened, "ready, and nothing waits"
                held = asyncio.create_task(_hold(dispatch))
                assert await until(lambda: bool(opened)) < 1.0
                assert (await directory.demand(CARD.model, -1))["choices"] == 1
                held.cancel()
                await until(lambda: directory._demand.num_choices == 0)
            finally:
                await dispatch.close()

    run(scenario())


async def _hold(dispatch: Dispatch) -> None:
    with dispatch.demand.holding():
        await asyncio.Event().wait()


def test_without_leave_to_fall_to_zero_no_replica_means_not_ready(secret_file: Path) -> None:
    async def scenario() -> None:
        directory = Directory(secret_file=str(secret_file))
        async with serving(directory) as url:
            dispatch = Dispatch(GatewaySettings(fd=-1, directory_url=url, secret=SECRET))
            await dispatch.start()
            try:
                await until(lambda: directory._demand.total("") is not None)
                assert not dispatch.is_ready()[0]
            finally:
                await dispatch.close()

    run(scenario())


def test_a_directory_that_refuses_or_is_away_changes_nothing_and_is_asked_again(secret_file: Path) -> None:
    async def scenario() -> None:
        refusing = Directory()
        async with serving(refusing) as url:
            settings = GatewaySettings(fd=-1, directory_url=url, secret=SECRET, can_wake=True)
            dispatch = Dispatch(settings)
            await dispatch.start()
            try:
                await asyncio.sleep(0.6)
                assert not dispatch.is_ready()[0], "nobody would start a replica"
                refusing._demand._secret_file = str(secret_file)
                await until(lambda: dispatch.is_ready()[0])
            finally:
                await dispatch.close()

    run(scenario())


def test_a_request_that_waited_in_vain_is_told_when_the_replica_will_be_there() -> None:
    world = World(queue_timeout_s=5.0)
    world.placement.ready_in_s = lambda: 42.0
    client = world.submit()
    world.pass_time(5.2)
    error = error_of(client)
    assert isinstance(error, NoCapacity) and error.retry_after_s == 42.0


def test_waiting_is_counted_by_model() -> None:
    world = World()
    replica = world.replica(granted=0)
    for _ in range(3):
        world.submit(prompt=(1, 2, 3, 4))
    assert world.placement.waiting() == {CARD.model: (3, 12)}
    replica.granted = 10
    replica.beat()
    assert world.placement.waiting() == {CARD.model: (0, 0)}
    assert isinstance(world.submit(), Client)


def test_a_model_that_sleeps_is_listed_and_its_request_held() -> None:
    with a_world(can_wake=True, queue_timeout_s=0.5) as world:
        world.plane.cards_now = []
        assert [model["id"] for model in world.get("/v1/models").json()["data"]] == [MODEL]
        assert world.get(f"/v1/models/{MODEL}").status_code == 200
        assert world.get("/v1/models/other").status_code == 404
        world.plane.demand._ready_at = time.monotonic() + 30.0
        reply = world.complete()
        assert reply.status_code == 503 and 25 <= int(reply.headers["retry-after"]) <= 31
    with a_world() as world:
        world.plane.cards_now = []
        assert world.get("/v1/models").json()["data"] == []
