"""What waits in gateways, as the directory hears it: who may say it, for how long it counts, and what it starts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.demand import PROOF_HEADER, DemandReply, DemandReport, sign
from serving.deployments import demand as demand_module
from serving.deployments.demand import HeldDemand
from serving.deployments.directory import Directory

SECRET = b"s" * 32


class Clocks:
    monotonic = 100.0
    wall = 1_000_000.0


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


def held(secret_file: Path, clocks: Clocks) -> HeldDemand:
    return HeldDemand(str(secret_file), clock=lambda: clocks.monotonic, wall=lambda: clocks.wall)


def body(gateway: str = "gateway-0", *, sent_at: float = 1_000_000.0, choices: int = 3, tokens: int = 40) -> bytes:
    report = DemandReport(gateway=gateway, sent_at=sent_at, choices={"m": choices}, tokens={"m": tokens})
    return msgspec.json.encode(report)


def test_reports_of_all_gateways_add_up_and_expire(secret_file: Path) -> None:
    clocks = Clocks()
    demand = held(secret_file, clocks)
    assert demand.total("m") is None
    for name, choices in (("a", 3), ("b", 4)):
        told = body(name, choices=choices)
        demand.take(told, sign(SECRET, told))
        clocks.monotonic += 1.0
    assert demand.total("m") == (7, 80, 2.0) and demand.num_choices == 7
    assert demand.total("other") == (0, 0, 2.0), "nobody waits for it, and that is known"
    clocks.monotonic += 3.5
    assert demand.total("m") == (4, 40, 4.5)
    clocks.monotonic += 1.0
    assert demand.total("m") is None, "silence is not an empty queue"


def test_news_are_what_came_went_or_grew(secret_file: Path) -> None:
    clocks = Clocks()
    demand = held(secret_file, clocks)
    news = []
    for choices in (0, 1, 1, 10, 11, 14, 16, 9, 0, 0):
        clocks.wall += 1.0
        told = body(sent_at=clocks.wall, choices=choices)
        news.append(demand.take(told, sign(SECRET, told)))
    assert news == [False, True, False, True, False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("told", "secret", "refusal"),
    [
        (body(), b"x" * 32, "not signed"),
        (body(sent_at=999_900.0), SECRET, "sent 100 s ago"),
        (body(sent_at=1_000_100.0), SECRET, "sent -100 s ago"),
        (body(sent_at=float("inf")), SECRET, "float|sent"),
        (body(choices=-1), SECRET, "outside 0 to"),
        (b"[]", SECRET, "object"),
        (b'{"gateway": "g"}', SECRET, "sent_at"),
        (b" " * 20_000, SECRET, "16384 bytes at most"),
    ],
)
def test_what_is_no_report_is_refused(secret_file: Path, told: bytes, secret: bytes, refusal: str) -> None:
    demand = held(secret_file, Clocks())
    with pytest.raises((PermissionError, ValueError, msgspec.MsgspecError), match=refusal):
        demand.take(told, sign(secret, told))
    assert demand.total("m") is None


def test_a_report_counts_once_and_nobody_can_send_it_again(secret_file: Path) -> None:
    clocks = Clocks()
    demand = held(secret_file, clocks)
    first, second = body(), body(sent_at=1_000_001.0, choices=0)
    demand.take(first, sign(SECRET, first))
    demand.take(second, sign(SECRET, second))
    with pytest.raises(PermissionError, match="later has come"):
        demand.take(first, sign(SECRET, first))
    assert demand.num_choices == 0


def test_without_a_secret_nobody_can_sign() -> None:
    told = body()
    with pytest.raises(PermissionError):
        HeldDemand("").take(told, sign(b"", told))


def test_a_changed_secret_is_read_again(secret_file: Path) -> None:
    demand = held(secret_file, Clocks())
    told = body()
    demand.take(told, sign(SECRET, told))
    secret_file.write_bytes(b"n" * 32)
    told = body(sent_at=1_000_001.0)
    with pytest.raises(PermissionError):
        demand.take(told, sign(SECRET, told))
    demand.take(told, sign(b"n" * 32, told))


def test_gateways_are_bounded(secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand_module, "MAX_GATEWAYS", 2)
    demand = held(secret_file, Clocks())
    for name in ("a", "b"):
        told = body(name)
        demand.take(told, sign(SECRET, told))
    told = body("c")
    with pytest.raises(ValueError, match="limit of 2"):
        demand.take(told, sign(SECRET, told))


# --- the directory ------------------------------------------------------------------------------


class Waker:
    """Stands where Serve's handle is: a call that is open until a replica runs."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_open = 0
        self.runs = asyncio.Event()
        self.failures = 0

    async def __call__(self) -> None:
        self.num_calls += 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the controller is away")
        self.num_open += 1
        try:
            await self.runs.wait()
        finally:
            self.num_open -= 1


class World:
    """A directory behind its HTTP surface."""

    def __init__(self, secret_file: Path) -> None:
        self.waker = Waker()
        self.directory = Directory(secret_file=str(secret_file), wake=self.waker)

        async def answer(request: Request) -> Response:
            return await self.directory(request)

        route = Route("/directory{path:path}", answer, methods=["GET", "POST"])
        transport = httpx.ASGITransport(app=Starlette(routes=[route]))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://directory")
        self._sent_at = 0.0

    async def tell(self, choices: int, proof: str | bytes | None = None) -> httpx.Response:
        self._sent_at = max(self._sent_at + 1e-6, time.time())
        told = body(sent_at=self._sent_at, choices=choices)
        headers = {PROOF_HEADER: sign(SECRET, told) if proof is None else proof}
        return await self.http.post("/directory/demand", content=told, headers=headers)

    async def until(self, condition: Any, timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


REPLICA = {"id": "a", "epoch": 1, "host": "127.0.0.1", "port": 7600, "card": {}, "state": "ready"}


def test_one_call_is_open_exactly_while_something_waits_and_nobody_serves(secret_file: Path) -> None:
    async def scenario() -> None:
        world = World(secret_file)
        answer = await world.tell(0)
        assert msgspec.json.decode(answer.content, type=DemandReply) == DemandReply(num_ready=0)
        await asyncio.sleep(0.05)
        assert world.waker.num_calls == 0
        for choices in (2, 5):
            await world.tell(choices)
            await world.until(lambda: world.waker.num_open == 1)
        assert world.waker.num_calls == 1
        await world.directory.renew(REPLICA)
        await world.until(lambda: world.waker.num_open == 0)
        await world.tell(9)
        await asyncio.sleep(0.05)
        assert world.waker.num_open == 0, "a replica serves: the policy takes over"
        await world.directory.leave("a")
        await world.until(lambda: world.waker.num_open == 1)
        answer = await world.tell(9)
        reply = msgspec.json.decode(answer.content, type=DemandReply)
        assert reply.ready_in_s is not None and reply.ready_in_s >= 1.0, "as the last start took"
        await world.tell(0)
        await world.until(lambda: world.waker.num_open == 0)

    run(scenario())


def test_a_wake_that_fails_is_tried_again(secret_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.deployments.directory.WAKE_AGAIN_S", 0.05)

    async def scenario() -> None:
        world = World(secret_file)
        world.waker.failures = 3
        await world.tell(1)
        await world.until(lambda: world.waker.num_open == 1)
        assert world.waker.num_calls == 4

    run(scenario())


def test_what_is_not_signed_starts_nothing(secret_file: Path) -> None:
    async def scenario() -> None:
        world = World(secret_file)
        assert (await world.tell(5, proof="0" * 64)).status_code == 403
        assert (await world.tell(5, proof=b"\xfcnsigned")).status_code == 403

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(1000):
                yield b" " * 1024

        assert (await world.http.post("/directory/demand", content=endless())).status_code == 400
        await asyncio.sleep(0.05)
        assert world.waker.num_calls == 0

    run(scenario())


def test_a_replica_hears_of_news_at_once(secret_file: Path) -> None:
    async def scenario() -> None:
        world = World(secret_file)
        assert (await world.directory.demand("m", -1))["choices"] == -1, "no gateway has told"
        await world.tell(0)
        told = await world.directory.demand("m", -1)
        assert told["choices"] == 0
        asking = asyncio.create_task(world.directory.demand("m", told["news"]))
        await asyncio.sleep(0.05)
        assert not asking.done()
        await world.tell(4)
        told = await asyncio.wait_for(asking, 0.5)
        assert told["choices"] == 4 and told["tokens"] == 40 and told["age_s"] < 0.5

    run(scenario())
