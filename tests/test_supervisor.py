"""The supervisor with a stand-in gateway and the local runtime with stand-in replicas."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from serving import config, found
from serving.config import ServeSettings
from serving.errors import SettingsError
from serving.run_folder import RunFolder
from serving.supervisor import StartFailed, Supervisor, listen
from tests.stand_in import ask, eventually, fetch, is_alive

STAND_IN = "tests.stand_in:StandInServer"


class Recorder:
    """A view that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str]] = []
        self.loads: list[tuple[str, int, int]] = []
        self.lines: list[str] = []
        self.urls: list[str] = []

    def phase(self, who: str, name: str, seconds: float) -> None:
        self.phases.append((who, name))

    def loading(self, who: str, done_bytes: int, total_bytes: int, seconds: float) -> None:
        self.loads.append((who, done_bytes, total_bytes))

    def log(self, source: str, line: str, level: str = "info") -> None:
        self.lines.append(f"{source} | {line}")

    def ready(self, url: str, seconds: float) -> None:
        self.urls.append(url)


def make_settings(**flags: object) -> ServeSettings:
    return config.load({"runtime": "local", "port": 0, **flags}, environ={"HOME": "/tmp"})


async def until(check: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The first true value of `check`, called on the loop."""
    async with asyncio.timeout(timeout_s):
        while True:
            if value := check():
                return value
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def serving(
    settings: ServeSettings, view: Recorder, *, find_model: Callable[[], Path] = lambda: Path("model")
) -> AsyncIterator[Supervisor]:
    """A running supervisor, stopped at the end."""
    supervisor = Supervisor(
        settings,
        found.find(settings),
        listener=listen(settings.host, settings.port),
        find_model=find_model,
        view=view,
        gateway_module="tests.stand_in",
        server=STAND_IN,
    )
    stop = asyncio.Event()
    run = asyncio.create_task(supervisor.run(stop))
    try:
        await until(lambda: bool(view.urls) or run.done())
        if run.done():
            run.result()
        yield supervisor
    finally:
        stop.set()
        if not run.done():
            await run


async def members(supervisor: Supervisor) -> list[Any]:
    """[(pid, epoch)] of the replicas as the gateway sees them."""
    _, body = await asyncio.to_thread(fetch, f"{supervisor.url}/who")
    return [tuple(member) if member else None for member in body["members"]]


async def other_than(old: tuple[int, int], supervisor: Supervisor) -> tuple[int, int]:
    """The first replica, as soon as it is not the old one."""
    async with asyncio.timeout(15.0):
        while True:
            now = (await members(supervisor))[0]
            if now is not None and now[0] != old[0]:
                return now
            await asyncio.sleep(0.02)


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_service_starts_and_stops_without_leaving_a_process() -> None:
    async def scenario() -> None:
        view = Recorder()
        async with serving(make_settings(replicas=2), view) as supervisor:
            replicas = await members(supervisor)
            pids = [pid for pid, _ in replicas] + [supervisor.gateway.pid, supervisor.runtime.pid]
            assert len(set(pids)) == 4 and all(is_alive(pid) for pid in pids)
            folder = supervisor._folder.path
            assert folder.stat().st_mode & 0o777 == 0o700
            begun = time.monotonic()
        assert time.monotonic() - begun < 5.0
        assert not [pid for pid in pids if is_alive(pid)]
        assert not folder.exists()
        assert view.urls == [supervisor.url]
        assert {("model", "pull and verify"), ("local", "import"), ("replica 1", "load")} <= set(view.phases)
        assert ("replica 1", 1_000_000, 1_000_000) in view.loads

    asyncio.run(scenario())


def test_a_killed_gateway_comes_back_on_the_same_socket_and_no_connection_is_refused() -> None:
    async def scenario() -> None:
        async with serving(make_settings(), Recorder()) as supervisor:
            _, before = await asyncio.to_thread(fetch, f"{supervisor.url}/who")
            os.kill(before["pid"], signal.SIGKILL)
            # At once, while nobody accepts: the connection waits in the backlog of the supervisor's socket.
            _, after = await asyncio.to_thread(fetch, f"{supervisor.url}/who")
            assert after["pid"] == supervisor.gateway.pid != before["pid"]

    asyncio.run(scenario())


def test_secrets_stand_in_no_process_list() -> None:
    async def scenario() -> None:
        async with serving(make_settings(), Recorder()) as supervisor:
            secret = supervisor._folder.secret.hex()
            _, seen = await asyncio.to_thread(fetch, f"{supervisor.url}/who")
            assert secret in seen["argv"][0]
            for pid in (supervisor.gateway.pid, supervisor.runtime.pid):
                assert secret not in command_line(pid)

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["kill", "exit", "sick", "stop"])
def test_a_replica_that_dies_falls_sick_or_stands_still_is_replaced_on_the_same_path(end: str) -> None:
    async def scenario() -> None:
        view = Recorder()
        async with serving(make_settings(replicas=2), view) as supervisor:
            first, second = await members(supervisor)
            address = f"unix:{supervisor._folder.path}/replica-0.sock"
            begun = time.monotonic()
            if end == "kill":
                os.kill(first[0], signal.SIGKILL)
            elif end == "stop":
                os.kill(first[0], signal.SIGSTOP)
            else:
                await asyncio.to_thread(ask, address, end)
            now = await other_than(first, supervisor)
            took = time.monotonic() - begun
            assert took < (6.0 if end == "stop" else 3.0)
            assert now[1] != first[1], "a restarted replica has a new epoch"
            assert not is_alive(first[0])
            assert (await members(supervisor))[1] == second, "its neighbour never noticed"
            assert any("replica 0" in line and "restarting" in line for line in view.lines)
            assert end != "sick" or "local | replica 0 is sick: told to be sick" in view.lines
            assert not any("Traceback" in line for line in view.lines)

    asyncio.run(scenario())


def test_a_killed_runtime_takes_its_replicas_along_and_starts_them_again() -> None:
    async def scenario() -> None:
        async with serving(make_settings(), Recorder()) as supervisor:
            [old] = await members(supervisor)
            os.kill(supervisor.runtime.pid, signal.SIGKILL)
            await until(lambda: not is_alive(old[0]))
            await other_than(old, supervisor)

    asyncio.run(scenario())


def test_a_replica_that_cannot_load_again_says_why_until_it_can(tmp_path: Path) -> None:
    async def scenario() -> None:
        view, gone = Recorder(), tmp_path / "model.gone"
        async with serving(make_settings(), view, find_model=lambda: tmp_path / "model") as supervisor:
            [old] = await members(supervisor)
            gone.touch()
            os.kill(old[0], signal.SIGKILL)
            await until(lambda: sum("tensor model.norm.weight has gone" in line for line in view.lines) >= 2)
            gone.unlink()
            await other_than(old, supervisor)

    asyncio.run(scenario())


def test_a_model_that_does_not_load_ends_the_start_with_its_reason() -> None:
    async def scenario() -> None:
        with pytest.raises(StartFailed, match=r"model\.norm\.weight is missing"):
            async with serving(make_settings(), Recorder(), find_model=lambda: Path("broken")):
                pass

    asyncio.run(scenario())


def test_replicas_that_are_killed_while_loading_end_the_start() -> None:
    async def scenario() -> None:
        with pytest.raises(StartFailed, match=r"killed by SIGKILL 3 times while loading; is there enough memory\?"):
            async with serving(make_settings(), Recorder(), find_model=lambda: Path("too-big")):
                pass

    asyncio.run(scenario())


def test_a_pull_that_fails_ends_the_start_with_its_reason() -> None:
    def find_model() -> Path:
        raise SettingsError("no model here")

    async def scenario() -> None:
        with pytest.raises(SettingsError, match="no model here"):
            async with serving(make_settings(), Recorder(), find_model=find_model):
                pass

    asyncio.run(scenario())


def test_a_gateway_that_never_lives_ends_the_start_and_its_words_are_shown() -> None:
    async def scenario() -> None:
        view = Recorder()
        with pytest.raises(StartFailed, match="the gateway ended 3 times"):
            async with serving(make_settings(served_model_name="dead-gateway"), view):
                pass
        assert "gateway-0 | no such thing as a gateway" in view.lines

    asyncio.run(scenario())


def test_children_die_with_a_killed_supervisor() -> None:
    script = textwrap.dedent("""
        import asyncio, os
        from tests.test_supervisor import Recorder, make_settings, members, serving

        async def main():
            async with serving(make_settings(), Recorder()) as supervisor:
                [(replica, _)] = await members(supervisor)
                print(supervisor.gateway.pid, supervisor.runtime.pid, replica, supervisor._folder.path, flush=True)
                await asyncio.sleep(60)

        asyncio.run(main())
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        *pids, folder = process.stdout.readline().split()
        assert all(is_alive(int(pid)) for pid in pids)
    finally:
        process.kill()
        process.communicate()
    eventually(lambda: not any(is_alive(int(pid)) for pid in pids), 5.0)
    assert Path(folder).exists()
    RunFolder(Path(folder).parent).remove()
    assert not Path(folder).exists(), "the next run clears what a killed one left"


def test_a_taken_port_is_refused_at_once_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"port {port} on 127\.0\.0\.1 is taken.*--port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"--host 203\.0\.113\.7"):
        listen("203.0.113.7", 0)
