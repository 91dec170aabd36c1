"""The data plane as the API layer sees it, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import random
import time
import weakref
from pathlib import Path

import pytest

from serving.config import GatewaySettings
from serving.errors import NoCapacity, SettingsError
from serving.gateway.dispatch import Dispatch
from serving.gateway.fleet import Fleet
from serving.gateway.membership import Entry, Listing, Membership
from serving.gateway.streams import Dispatcher
from tests.faults import SECRET, FakeReplica
from tests.gateway.plane import Client, all_ready, assert_undisturbed, mixed_clients, plane, run, socket_paths, until
from tests.scripted import make_card


def test_it_is_what_the_api_layer_asks_for() -> None:
    dispatcher: Dispatcher = Dispatch(GatewaySettings(fd=-1))
    assert dispatcher.card("tiny") is None


def test_a_bad_secret_or_endpoint_is_named() -> None:
    with pytest.raises(SettingsError, match="hexadecimal"):
        Dispatch(GatewaySettings(fd=-1, secret="xyz"))

    async def scenario() -> None:
        dispatch = Dispatch(GatewaySettings(fd=-1, replicas=("carrier-pigeon",)))
        with pytest.raises(SettingsError, match="carrier-pigeon"):
            await dispatch.start()
        await dispatch.close()

    run(scenario())


def test_permits_are_respected_under_load() -> None:
    """The replicas count; `plane` asserts that they saw no submit without a permit."""

    async def scenario() -> None:
        async with plane(2, max_rows=3, max_waiting=2, step_s=0.0005) as (dispatch, replicas):
            clients = mixed_clients(seed=1, count=60)
            for client in clients:
                dispatch.submit(client.request)
            assert sum(dispatch.num_queued().values()) > 40
            for client in clients:
                await client.done(20)
                assert_undisturbed(client)
            assert min(len(replica.submits) for replica in replicas) > 20

    run(scenario())


def test_a_cancel_reaches_the_replica_within_50_ms() -> None:
    async def scenario() -> None:
        async with plane(1, step_s=0.005) as (dispatch, (replica,)):
            delays = []
            for _ in range(10):
                client = Client(max_tokens=4000)
                dispatch.submit(client.request)
                await until(lambda: client.num_tokens > 2)  # noqa: B023
                began = time.monotonic()
                dispatch.cancel(client.choice)
                length = client.num_tokens
                await until(lambda: not replica.num_rows)
                delays.append(replica.cancels[-1][0] - began)
                await asyncio.sleep(0.01)
                assert client.num_tokens == length
            assert sorted(delays)[5] < 0.05

    run(scenario())


def test_ten_thousand_random_cancels_leak_nothing() -> None:
    async def scenario() -> None:
        draw = random.Random(7)
        async with plane(2, max_rows=30, step_s=0.0) as (dispatch, replicas):
            alive: list[weakref.ref[Client]] = []
            current: list[Client] = []
            num_cancelled = 0
            while num_cancelled < 10_000:
                client = Client(n=draw.choice((1, 2, 3)), max_tokens=draw.randrange(1, 30))
                dispatch.submit(client.request)
                current.append(client)
                if len(alive) % 40 == 0:
                    await asyncio.sleep(0)
                alive.append(weakref.ref(client))
                if len(current) > 50:
                    victim = current.pop(draw.randrange(len(current)))
                    for choice in victim.request.choices:
                        num_cancelled += not choice.is_done
                        dispatch.cancel(choice)
                    seen = len(victim.progress)
                    victim.on_token = lambda choice: pytest.fail("progress after a cancel")
                    assert len(victim.progress) == seen
            for client in current:
                await client.done()
                assert_undisturbed(client)
            await until(lambda: sum(replica.num_rows for replica in replicas) == 0)
            assert dispatch.num_unfinished == 0
            assert dispatch.num_queued() == {"f1": 0}
            placement = dispatch._placement
            assert len(placement._deadlines) == 0
            assert [link.load for link in placement.fleet.all_links()] == [0, 0]
            assert sum(link.num_rows for link in placement.fleet.all_links()) == 0
            current.clear()
            del client, victim, choice
            gc.collect()
            assert sum(ref() is not None for ref in alive) == 0

    run(scenario())


def test_cancels_at_any_moment_cross_no_streams() -> None:
    """Two tenants whose tokens are disjoint by construction of the check: every journal is its own."""

    async def scenario() -> None:
        draw = random.Random(3)
        async with plane(2, step_s=0.0002) as (dispatch, _):
            clients = mixed_clients(seed=11, count=80)
            for client in clients:
                dispatch.submit(client.request)
                if draw.random() < 0.5:
                    await asyncio.sleep(draw.random() * 0.003)
                    victim = draw.choice(clients)
                    for choice in victim.request.choices:
                        dispatch.cancel(choice)
            await until(lambda: dispatch.num_unfinished == 0)
            survivors = [client for client in clients if client.is_done]
            assert 10 < len(survivors) < 80
            for client in survivors:
                assert_undisturbed(client)

    run(scenario())


def test_the_card_stays_while_every_replica_is_down() -> None:
    async def scenario() -> None:
        async with plane(1) as (dispatch, (replica,)):
            assert dispatch.is_ready() == (True, "")
            assert dispatch.card("tiny") == replica.card
            assert dispatch.card("other") is None
            replica.kill()
            await until(lambda: not dispatch.is_ready()[0])
            assert "no replica is connected, 1 known" in dispatch.is_ready()[1]
            assert dispatch.cards() == [replica.card]
            (entry,) = dispatch.progress()
            assert (entry["id"], entry["state"], entry["ranks"]) == ("replica-0", "down", [])
            client = Client()
            dispatch.submit(client.request)
            await replica.restart()
            await client.done()
            assert_undisturbed(client)

    run(scenario())


def test_progress_has_the_shape_that_scripts_read() -> None:
    async def scenario() -> None:
        async with plane(2) as (dispatch, _):
            progress = json.loads(json.dumps(dispatch.progress()))
            assert [(entry["id"], entry["state"], entry["epoch"]) for entry in progress] == [
                ("replica-0", "ready", 1),
                ("replica-1", "ready", 1),
            ]
            for entry in progress:
                (rank,) = entry["ranks"]
                assert rank.keys() == {"rank", "host", "pid", "step", "age_s"}
                assert 0 <= rank["age_s"] < 1

    run(scenario())


@pytest.mark.parametrize("state", ["loading", "draining"])
def test_not_ready_while_no_replica_takes_work(state: str) -> None:
    async def scenario() -> None:
        async with plane(1) as (dispatch, (replica,)):
            replica.state = state
            await until(lambda: not dispatch.is_ready()[0])
            assert dispatch.is_ready()[1] == f"no replica is ready: {state}"
            replica.state = "ready"
            await until(lambda: dispatch.is_ready()[0])

    run(scenario())


ASSETS = {"tokenizer.json": b"{}" * 4_000_000, "chat_template.jinja": b"{{ messages }}"}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_assets_are_fetched_checked_and_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with plane(1, assets=ASSETS, cache_dir=str(tmp_path)) as (dispatch, (replica,)):
            paths = await asyncio.gather(*(dispatch.asset(replica.card, name) for name in [*ASSETS] * 3))
            assert [path.read_bytes() for path in paths] == [*ASSETS.values()] * 3
            assert names_in(tmp_path) == sorted(replica.card.assets.values())
            await until(lambda: dispatch.is_ready()[0])
            with pytest.raises(FileNotFoundError, match="no file vocab"):
                await dispatch.asset(replica.card, "vocab.txt")
        damaged = tmp_path / hashlib.sha256(ASSETS["chat_template.jinja"]).hexdigest()
        damaged.write_bytes(b"{{ attack }}")
        async with plane(1, assets=ASSETS, cache_dir=str(tmp_path)) as (dispatch, (replica,)):
            path = await dispatch.asset(replica.card, "chat_template.jinja")
            assert path.read_bytes() == ASSETS["chat_template.jinja"]

    run(scenario())


def test_a_replica_whose_files_differ_from_its_card_does_not_make_us_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.gateway.assets.FETCH_TIMEOUT_S", 0.3)
    monkeypatch.setattr("serving.gateway.dispatch.PREFETCH_RETRY_S", 0.05)

    name = "chat_template.jinja"
    options = {"card": make_card(assets={name: ASSETS[name]}), "assets": {name: b"{{ other }}"}}

    async def scenario() -> None:
        async with plane(1, cache_dir=str(tmp_path), **options) as (dispatch, (replica,)):
            with pytest.raises(NoCapacity, match=r"chat_template\.jinja"):
                await dispatch.asset(replica.card, name)
            assert name in dispatch.is_ready()[1]
            replica.assets = {name: ASSETS[name]}
            await until(lambda: dispatch.is_ready()[0])

    run(scenario())


def test_closing_leaves_no_task_and_no_folder() -> None:
    async def scenario() -> None:
        async with plane(2, assets=ASSETS) as (dispatch, replicas):
            client = Client(max_tokens=4000)
            dispatch.submit(client.request)
            await until(lambda: client.num_tokens > 0)
            folder = (await dispatch.asset(replicas[0].card, "tokenizer.json")).parent
            assert names_in(folder)
            await dispatch.close()
            await dispatch.close()
            assert names_in(folder) == []
            assert client.choice.error is not None
            await until(lambda: not any(replica.peers for replica in replicas))
            names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
            assert not {name for name in names if name.startswith(("Membership", "Dispatch", "Assets"))}

    run(scenario())


# --- membership -----------------------------------------------------------------------------------


async def serve_directory(listings: list[str], versions: list[str]) -> tuple[asyncio.Server, str]:
    """A directory of plain HTTP whose answer is the last of `listings`; notes what it was asked."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        versions.append(request.split()[1].decode().partition("since=")[2])
        body = listings[-1].encode()
        status = b"200 OK" if body else b"503 Service Unavailable"
        writer.write(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    return server, f"http://127.0.0.1:{port}/directory"


def listing(version: int, *ports: int, state: str = "ready") -> str:
    entries = [
        {"id": f"r{port}", "epoch": 1, "host": "127.0.0.1", "port": port, "card": {}, "state": state} for port in ports
    ]
    return json.dumps({"version": version, "replicas": entries})


def test_the_directory_brings_replicas_and_its_silence_takes_none(free_ports: tuple[int, int]) -> None:
    async def scenario() -> None:
        first, second = free_ports
        listings, versions = [listing(1, first)], list[str]()
        server, url = await serve_directory(listings, versions)
        async with FakeReplica(f"tcp:127.0.0.1:{first}"), FakeReplica(f"tcp:127.0.0.1:{second}", name="replica-1"):
            dispatch = Dispatch(GatewaySettings(fd=-1, directory_url=url, secret=SECRET))
            await dispatch.start()
            await until(lambda: dispatch.is_ready()[0])
            listings.append(listing(2, first, second))
            await until(lambda: len(dispatch.progress()) == 2)
            await all_ready(dispatch)
            listings.append("")
            await asyncio.sleep(0.2)
            listings.append("[nonsense")
            await asyncio.sleep(0.2)
            listings.append(listing(1))  # a directory that was restarted and is still empty
            num_asked = len(versions)
            await until(lambda: len(versions) > num_asked + 1)
            await asyncio.sleep(0.05)
            assert [entry["state"] for entry in dispatch.progress()] == ["ready", "ready"]
            client = Client()
            dispatch.submit(client.request)
            await client.done()
            listings.append(listing(3, first, second, state="draining"))
            await until(lambda: dispatch.is_ready()[1] == "no replica is ready: draining")
            assert versions[0] == "-1"
            assert "2" in versions
            await dispatch.close()
            server.close()

    run(scenario())


def test_a_replica_that_is_gone_and_not_listed_is_dropped(free_ports: tuple[int, int]) -> None:
    async def scenario() -> None:
        first, second = free_ports
        fleet = Fleet()

        async def refuse(replica: object) -> None:
            raise ConnectionRefusedError

        membership = Membership(fleet, refuse, lambda link: None, time.monotonic)  # type: ignore[arg-type]
        both = [Entry(host="127.0.0.1", port=first), Entry(host="127.0.0.1", port=second)]
        membership.take(Listing(version=1, replicas=both))
        await asyncio.sleep(0.5)
        assert len(fleet.replicas) == 2  # listed: dialled for ever
        membership.take(Listing(version=2, replicas=both[:1]))
        await until(lambda: list(fleet.replicas) == [f"tcp:127.0.0.1:{first}"])
        membership.take(Listing(version=3, replicas=[*both, Entry(host="", port=1), Entry(host="h", port=0)]))
        assert len(fleet.replicas) == 2
        await membership.close()

    run(scenario())


@pytest.fixture
def free_ports() -> tuple[int, int]:
    import socket

    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def test_a_replica_that_comes_late_is_found() -> None:
    async def scenario() -> None:
        with socket_paths(1) as (path,):
            dispatch = Dispatch(GatewaySettings(fd=-1, replicas=(path,), secret=SECRET))
            await dispatch.start()
            await asyncio.sleep(0.3)
            assert "1 known" in dispatch.is_ready()[1]
            async with FakeReplica(path):
                await until(lambda: dispatch.is_ready()[0], 2.0)
            await dispatch.close()

    run(scenario())


def test_on_uvloop_as_in_production() -> None:
    import uvloop

    async def scenario() -> None:
        async with plane(2) as (dispatch, replicas):
            replicas[0].cut_at = 50
            clients = mixed_clients(seed=2)
            for client in clients:
                dispatch.submit(client.request)
            for client in clients:
                await client.done()
                assert_undisturbed(client)
            assert replicas[0].num_cuts == 1

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
