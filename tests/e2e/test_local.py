"""The whole service under `--runtime local` on a tiny model: fast enough for many blows."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.service import Service, Streams, kill_in_the_middle, mixed_requests, serving
from tests.tiny import tiny_model_folder

MODEL = "tiny"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("local")
    # Wide enough that a step takes milliseconds: a blow must find streams running.
    model = tiny_model_folder(
        folder / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, max_position_embeddings=1024
    )
    flags = ("--runtime", "local", "--model", str(model), "--served-model-name", MODEL, "--max-model-len", "1024")
    with serving(folder, *flags, "--kv-cache-bytes", "256MiB") as service:
        yield service


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_replica_costs_no_token(service: Service, blow: signal.Signals) -> None:
    kill_in_the_middle(service, MODEL, max_tokens=300, number=blow)
    service.wait_until_ready(30)


def test_the_same_request_gives_the_same_bytes_alone_and_in_company(service: Service) -> None:
    requests = mixed_requests(MODEL, 60)
    together = Streams(service, requests).join()
    alone = [Streams(service, [request]).join()[0] for request in requests]
    for at, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert a == b, f"request {at}"


def test_a_client_that_leaves_frees_its_blocks_at_once(service: Service) -> None:
    for is_streamed in (True, False):
        body = {"model": MODEL, "prompt": "x", "max_tokens": 900, "ignore_eos": True, "n": 3, "stream": is_streamed}
        with socket.create_connection(("127.0.0.1", service.port)) as sock:
            data = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data)
            deadline = time.monotonic() + 10
            while not any(replica.get("num_running") for replica in service.replicas()):
                assert time.monotonic() < deadline, "the request does not start"
                time.sleep(0.01)
        # 250 ms to cancel, and a beat until we can see it.
        service.wait_for_blocks(timeout_s=0.75)


def test_thirty_two_streams_with_the_official_client(service: Service) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none", timeout=60) as client:

            async def one(at: int) -> str:
                text = ""
                chunks = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"hello {at % 4}"}],
                    stream=True,
                    max_completion_tokens=40,
                    temperature=0,
                )
                async for chunk in chunks:
                    text += chunk.choices[0].delta.content or ""
                return text

            return list(await asyncio.gather(*(one(at) for at in range(32))))

    texts = asyncio.run(main())
    assert all(texts[at] == texts[at % 4] for at in range(32))


def test_errors_reach_the_official_client_by_class(service: Service) -> None:
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="nonsense"):
            client.completions.create(model="nonsense", prompt="x")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as caught:
            client.completions.create(model=MODEL, prompt="x", max_tokens=5000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="x", extra_body={"frobnicate": 1})
        assert caught.value.code == "unsupported_parameter" and caught.value.param == "frobnicate"


def test_a_port_that_is_taken_is_named(service: Service, tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "serve", "--runtime", "local", "--port", str(service.port)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert str(service.port) in done.stderr and "--port" in done.stderr
