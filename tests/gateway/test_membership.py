"""Finding replicas while a service starts, quietly, and whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator

import pytest

from serving.gateway.fleet import Fleet
from serving.gateway.membership import MAX_START_BACKOFF_S, QUIET_S, Entry, Listing, Membership
from tests.gateway.plane import run, until


class Dialler:
    """Fails as told; `num_dials` counts."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_dials = 0
        self.now = 0.0

    async def __call__(self, replica: object) -> None:
        self.num_dials += 1
        raise self.error


@contextlib.asynccontextmanager
async def a_membership(dialler: Dialler) -> AsyncIterator[tuple[Membership, Fleet]]:
    fleet = Fleet()
    membership = Membership(fleet, dialler, lambda link: None, lambda: dialler.now)  # type: ignore[arg-type]
    membership.take(Listing(version=1, replicas=[Entry(host="127.0.0.1", port=7600)]))
    yield membership, fleet
    await membership.close()


def test_a_start_is_quiet_and_a_lasting_failure_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        dialler = Dialler(ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 7600)"))
        async with a_membership(dialler):
            await until(lambda: dialler.num_dials >= 3)
            assert not caplog.records
            dialler.now += QUIET_S
            await until(lambda: dialler.num_dials >= 5)
            assert len(caplog.records) == 1
            dialler.error = TimeoutError()
            await until(lambda: dialler.num_dials >= 7)
            assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
                "Connection refused",
                "no answer in time",
            ]

    caplog.set_level(logging.INFO, "argosy.gateway")
    run(scenario())


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (FileNotFoundError(2, "No such file or directory: '/tmp/x/replica-0.sock'"), "No such file or directory"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 7600)"), "no connection"),
        (ConnectionError("closed during the handshake"), "closed during the handshake"),
        (RuntimeError("a bug"), "a bug"),
    ],
)
def test_causes_tell_no_path_and_no_address_and_end_no_search(error: Exception, cause: str) -> None:
    async def scenario() -> None:
        dialler = Dialler(error)
        async with a_membership(dialler) as (_, fleet):
            await until(lambda: dialler.num_dials >= 3)
            (entry,) = fleet.progress(0.0)
            assert entry["error"] == cause

    run(scenario())


def test_the_directory_is_found_soon_after_it_begins() -> None:
    async def scenario() -> None:
        dialler = Dialler(OSError())
        asked: list[float] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked.append(asyncio.get_running_loop().time())
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        membership = Membership(Fleet(), dialler, lambda link: None, lambda: 0.0)  # type: ignore[arg-type]
        membership.start((), f"http://127.0.0.1:{port}/directory")
        await until(lambda: len(asked) >= 7, 5.0)
        assert max(b - a for a, b in itertools.pairwise(asked)) < 2 * MAX_START_BACKOFF_S
        await membership.close()
        server.close()

    run(scenario())
