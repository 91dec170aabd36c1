"""What holds under every runtime. A test module subclasses `Promises` and has a `service` fixture."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import time
from typing import ClassVar

import openai
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.service import Service

SERVES_OWN = ("ray::ServeReplica:",)
"""Serve's inter-replica gRPC: it binds every interface and offers no setting; a token guards it (RAY_AUTH_MODE)."""


class Promises:
    model: ClassVar[str]
    max_model_len: ClassVar[int]
    listens_everywhere: ClassVar[tuple[str, ...]] = ()

    def test_only_loopback_listens(self, service: Service) -> None:
        """C20: sockets on loopback, but for those on the committed list."""
        found = []
        process = psutil.Process(service.process.pid)
        for child in [process, *process.children(recursive=True)]:
            for connection in child.net_connections(kind="tcp"):
                address = ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:"))
                if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                    found.append((child.cmdline()[0].split()[0], connection.laddr))
        unexpected = [(name, address) for name, address in found if not name.startswith(self.listens_everywhere)]
        assert not unexpected

    def test_a_client_that_leaves_frees_its_blocks_at_once(self, service: Service) -> None:
        for is_streamed in (True, False):
            body = {
                "model": self.model,
                "prompt": "x",
                "max_tokens": 900,
                "ignore_eos": True,
                "n": 3,
                "stream": is_streamed,
            }
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

    def test_thirty_two_streams_with_the_official_client(self, service: Service) -> None:
        async def main() -> list[str]:
            async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none", timeout=60) as client:

                async def one(at: int) -> str:
                    text = ""
                    chunks = await client.chat.completions.create(
                        model=self.model,
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

    def test_errors_reach_the_official_client_by_class(self, service: Service) -> None:
        with openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError, match="nonsense"):
                client.completions.create(model="nonsense", prompt="x")
            with pytest.raises(
                openai.BadRequestError, match=f"maximum context length is {self.max_model_len} tokens"
            ) as caught:
                client.completions.create(model=self.model, prompt="x", max_tokens=5000)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(model=self.model, prompt="x", extra_body={"frobnicate": 1})
            assert caught.value.code == "unsupported_parameter" and caught.value.param == "frobnicate"
