"""The gateway as a process: on an inherited socket, over the real engine protocol, to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from serving.config import GatewaySettings
from tests.faults import SECRET, FakeReplica, make_card
from tests.gateway.plane import run, socket_paths, until
from tests.gateway.world import ASSETS, TOKENIZER

CARD = make_card(assets=ASSETS, tokenizer_size=TOKENIZER.size)


def launch(settings: GatewaySettings, log: Path) -> subprocess.Popen[bytes]:
    argument = msgspec.json.encode(settings).decode()
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "serving.gateway", argument]
        return subprocess.Popen(command, pass_fds=(settings.fd,), stderr=stderr)


@contextlib.asynccontextmanager
async def a_gateway(
    tmp_path: Path, num_replicas: int = 1, **faults: Any
) -> AsyncIterator[tuple[subprocess.Popen[bytes], httpx.AsyncClient, list[FakeReplica]]]:
    """A ready gateway process, a client for it, and its replicas."""
    with socket_paths(num_replicas) as endpoints, socket.create_server(("127.0.0.1", 0)) as listener:
        async with contextlib.AsyncExitStack() as stack:
            replicas = []
            for number, endpoint in enumerate(endpoints):
                replica = FakeReplica(endpoint, name=f"replica-{number}", card=CARD, assets=ASSETS, **faults)
                replicas.append(await stack.enter_async_context(replica))
            settings = GatewaySettings(
                fd=listener.fileno(),
                replicas=tuple(endpoints),
                secret=SECRET,
                served_model_name="tiny",
                cache_dir=str(tmp_path),
            )
            process = launch(settings, tmp_path / "stderr")
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            yield process, client, replicas


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[int, list[str]]:
    """`data:` payloads by choice index, without what C21 leaves out."""
    events: dict[int, list[str]] = {}
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200
        last = ""
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                payload = re.sub(r'"id":"[^"]*"|"created":\d+', "", line.removeprefix("data: "))
                assert "error" not in json.loads(line.removeprefix("data: "))
                events.setdefault(json.loads(line.removeprefix("data: "))["choices"][0]["index"], []).append(payload)
            last = line or last
    assert last == "data: [DONE]"
    return events


def bodies() -> list[dict[str, Any]]:
    return [
        {"prompt": f"prompt {number}", "seed": number, "max_tokens": 60, "ignore_eos": number % 3 != 0}
        | ({"n": 3} if number % 4 == 0 else {})
        | ({"logprobs": 2, "return_token_ids": True} if number % 4 == 1 else {})
        | ({"stop": ["e", "zz"]} if number % 4 == 2 else {})
        for number in range(16)
    ]


def test_sixteen_mixed_streams_survive_a_killed_replica_byte_for_byte(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_gateway(tmp_path, 2, step_s=0.004) as (_, client, replicas):
            undisturbed = await asyncio.gather(*(stream(client, body) for body in bodies()))
            streams = [asyncio.create_task(stream(client, body)) for body in bodies()]
            await until(lambda: sum(replica.num_rows for replica in replicas) >= 16)
            await asyncio.sleep(0.05)
            victim = max(replicas, key=lambda replica: replica.num_rows)
            num_moved = victim.num_rows
            victim.kill()
            assert num_moved > 0
            assert await asyncio.gather(*streams) == undisturbed
            survivor = next(replica for replica in replicas if replica is not victim)
            assert any(submit.resume_ids for submit in survivor.submits)

    run(test())


def test_a_client_that_leaves_frees_its_rows_on_the_replica(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_gateway(tmp_path, step_s=0.01) as (_, client, (replica,)):
            with contextlib.suppress(httpx.ReadTimeout):
                await client.post(
                    "/v1/completions",
                    json={"prompt": "x", "n": 4, "max_tokens": 2000, "ignore_eos": True},
                    timeout=0.3,
                )
            begun = time.monotonic()
            await until(lambda: replica.num_rows == 0)
            assert time.monotonic() - begun < 0.25
            assert len(replica.cancels) == 4

    run(test())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_within_seconds_and_with_success(tmp_path: Path, number: signal.Signals) -> None:
    async def test() -> None:
        async with a_gateway(tmp_path, step_s=0.05) as (process, client, _):
            body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                last = ""
                begun = time.monotonic()
                process.send_signal(number)
                with pytest.raises(httpx.RemoteProtocolError):
                    while True:
                        last = await anext(lines) or last
            code = await asyncio.to_thread(process.wait, 10)
            assert time.monotonic() - begun < 4
            assert code == 0
            assert "Traceback" not in (tmp_path / "stderr").read_text()
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == "The gateway is shutting down."

    run(test())


def test_settings_that_are_none_are_refused() -> None:
    ended = subprocess.run([sys.executable, "-m", "serving.gateway", '{"fd": "x"}'], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "fd" in ended.stderr
