"""`argosy gateway` as Kubernetes starts it: a real process, a real directory over HTTP, scripted replicas over TCP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from serving.deployments.directory import Directory
from serving.supervisor import free_port
from tests.faults import FakeReplica, make_card
from tests.gateway.plane import run, until
from tests.gateway.world import ASSETS, TOKENIZER

ROOT = Path(__file__).parent.parent
CARD = make_card(assets=ASSETS, tokenizer_size=TOKENIZER.size)
OLD, NEW = "0f" * 32, "a1" * 32
LONG = {"model": "tiny", "prompt": "x", "seed": 3, "max_tokens": 200, "ignore_eos": True, "stream": True}


class Cluster:
    """What a Ray cluster is to a gateway: a directory, and replicas that it tells of."""

    def __init__(self) -> None:
        self.directory = Directory(expire_s=600)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/directory"
        self.replicas: list[FakeReplica] = []
        self._stack = contextlib.AsyncExitStack()
        self._server = uvicorn.Server(
            uvicorn.Config(self._answer, port=port, log_config=None, lifespan="off", interface="asgi3")
        )

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request

        await (await self.directory(Request(scope)))(scope, receive, send)

    async def __aenter__(self) -> Cluster:
        self._serving = asyncio.create_task(self._server.serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        self._server.should_exit = self._server.force_exit = True
        await self._serving

    async def add(self, secret: str, **faults: Any) -> FakeReplica:
        port, number = free_port(), len(self.replicas)
        replica = FakeReplica(
            f"tcp:127.0.0.1:{port}", name=f"replica-{number}", card=CARD, assets=ASSETS, secret=secret, **faults
        )
        await self._stack.enter_async_context(replica)
        self.replicas.append(replica)
        entry = {"id": replica.name, "epoch": 1, "host": "127.0.0.1", "port": port, "card": {}, "state": "ready"}
        await self.directory.renew(entry)
        return replica


def launch(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stderr=output, stdout=output)


@contextlib.asynccontextmanager
async def a_gateway(
    tmp_path: Path, cluster: Cluster, **settings: Any
) -> AsyncIterator[tuple[subprocess.Popen[bytes], httpx.AsyncClient, Path]]:
    port = free_port()
    secret = tmp_path / "secret"
    secret.write_text(OLD + "\n")
    file = tmp_path / "settings.yaml"
    asked = {"host": "127.0.0.1", "port": port, "model": "tiny", "store": str(tmp_path), "drain_timeout_s": 20.0}
    file.write_text(json.dumps(asked | settings))
    command = [sys.executable, "-m", "serving.cli", "gateway", f"--config={file}", f"--directory-url={cluster.url}"]
    process = launch([*command, f"--secret-file={secret}"], tmp_path / "log")
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            await ready(client)
            yield process, client, secret
    finally:
        process.kill()
        process.wait(10)


async def ready(client: httpx.AsyncClient) -> None:
    for _ in range(1000):
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                return
        await asyncio.sleep(0.02)
    raise AssertionError("not ready within 20 s")


async def events(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Any]:
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def test_told_to_end_it_serves_its_streams_to_their_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with Cluster() as cluster:
            replica = await cluster.add(OLD, step_s=0.01)
            async with a_gateway(tmp_path, cluster) as (process, client, _):
                undisturbed = await events(client, LONG)
                running = asyncio.create_task(events(client, LONG))
                await until(lambda: replica.num_rows == 1)
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
                with pytest.raises(httpx.ConnectError):
                    async with httpx.AsyncClient() as newcomer:
                        await newcomer.get(f"{client.base_url}/livez")
                assert not running.done()
                assert await running == undisturbed
                assert await asyncio.to_thread(process.wait, 10) == 0

    run(test())


def test_a_stream_longer_than_the_drain_is_cut_and_nothing_stays(tmp_path: Path) -> None:
    async def test() -> None:
        async with Cluster() as cluster:
            replica = await cluster.add(OLD, step_s=0.05)
            async with a_gateway(tmp_path, cluster, drain_timeout_s=0.5) as (process, client, _):
                running = asyncio.create_task(events(client, LONG))
                await until(lambda: replica.num_rows == 1)
                left = children(process)
                begun = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 10) == 0
                assert time.monotonic() - begun < 5
                assert not any(child.is_running() for child in left)
                with pytest.raises(Exception):  # noqa: B017  # the error event, or the end of the connection
                    await running

    run(test())


def test_a_killed_gateway_process_comes_back_behind_the_same_port(tmp_path: Path) -> None:
    async def test() -> None:
        async with Cluster() as cluster:
            await cluster.add(OLD)
            async with a_gateway(tmp_path, cluster) as (process, client, _):
                [child] = children(process)
                os.kill(child.pid, signal.SIGKILL)
                await ready(client)
                assert await events(client, LONG | {"max_tokens": 5})
                assert [other.pid for other in children(process)] != [child.pid]

    run(test())


def test_a_secret_rotates_without_a_lost_token(tmp_path: Path) -> None:
    """Old; old and new; new and old, while a replica with the new one joins and one with the old one leaves; new."""

    async def test() -> None:
        async with Cluster() as cluster:
            first = await cluster.add(OLD, step_s=0.01)
            async with a_gateway(tmp_path, cluster) as (process, client, secret):
                undisturbed = await events(client, LONG)
                before = children(process)
                running = asyncio.create_task(events(client, LONG))
                await until(lambda: first.num_rows == 1)
                secret.write_text(f"{OLD}\n{NEW}\n")
                await until(lambda: set(children(process)) - set(before), timeout_s=10)
                second = await cluster.add(NEW, step_s=0.01)
                await until(lambda: second.num_connections > 0, timeout_s=10)
                assert await running == undisturbed  # by the process that knew the old secret alone
                secret.write_text(f"{NEW}\n{OLD}\n")
                first.kill()
                await ready(client)
                assert await events(client, LONG) == undisturbed
                assert second.submits

    run(test())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--directory-url=ftp://x", "--secret-file=/nowhere"], "--directory-url: 'ftp://x' does not begin with http"),
        (["--directory-url=http://127.0.0.1:1/directory", "--secret-file=/nowhere"], "in /nowhere: No such file"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "serving.cli", "gateway", "--port=0", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2
    assert words in ran.stderr


def test_it_needs_neither_torch_nor_ray() -> None:
    program = "import serving.cli, serving.gateway_alone, serving.gateway.server, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert "serving" in loaded
    assert not loaded & {"torch", "ray", "models", "numpy", "k8s"}
