"""Streams and their clients: who leaves is noticed, who is slow waits alone, what fails breaks off."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from serving.errors import EngineError, NoCapacity
from serving.gateway.reply import Pace
from tests.gateway.world import MODEL, Script, World, a_world, payloads, until

ENDLESS = Script(text="word " * 100, gap_s=0.002)
QUICK = Pace(period_s=0.02, first_comment_s=0.05, comment_s=0.05, stall_s=60.0)


def send(world: World, *, receive_buffer: int | None = None, **body: Any) -> socket.socket:
    """A raw connection that has sent a completion request."""
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", world.port))
    content = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 500, "ignore_eos": True} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 4}, {"n": 4}], ids=str)
def test_a_client_that_leaves_cancels_every_choice_within_250_ms(body: dict[str, Any]) -> None:
    with a_world(ENDLESS) as world:
        client = send(world, **body)
        until(lambda: world.plane.num_running == body.get("n", 1))
        time.sleep(0.05)
        client.close()
        assert until(lambda: world.plane.num_running == 0) < 0.25
        assert len(world.plane.cancelled) == body.get("n", 1)
        until(lambda: not world.gateway.replies)
        series = world.gateway.metrics.model(MODEL)
        assert (series.num_disconnects, series.num_running, series.num_waiting) == (1, 0, 0)


def test_a_client_that_leaves_while_queued_leaves_the_queue() -> None:
    with a_world(Script(queue_s=60.0)) as world:
        client = send(world, stream=True)
        until(lambda: world.plane.num_running == 1)
        client.close()
        assert until(lambda: world.plane.num_running == 0) < 0.25


def test_pipelined_requests_of_a_client_that_leaves_are_cancelled_too() -> None:
    with a_world(ENDLESS) as world:
        client = send(world, stream=True)
        until(lambda: world.plane.num_running == 1)
        content = b'{"prompt": "hi"}'
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        time.sleep(0.05)
        client.close()
        assert until(lambda: world.plane.num_running == 0) < 0.25


def test_many_leave_and_nothing_stays() -> None:
    with a_world(ENDLESS) as world:
        for number in range(100):
            client = send(world, stream=number % 2 == 0, n=1 + number % 3)
            if number % 5:
                time.sleep(0.002 * (number % 5))
            client.close()
        until(lambda: not world.gateway.replies and world.plane.num_running == 0)
        until(lambda: len(world.server.server_state.connections) == 0)
        assert world.gateway.admission.num_preparing == 0
        series = world.gateway.metrics.model(MODEL)
        assert series.num_running == series.num_waiting == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_fails_sends_its_error_and_breaks_the_connection(path: str) -> None:
    with a_world(Script(fail_after=4, failure=EngineError("The engine failed."), gap_s=0.01)) as world:
        body = {"stream": True, "n": 3, "prompt": "hi"}
        if "chat" in path:
            body = {"stream": True, "n": 3, "messages": [{"role": "user", "content": "hi"}]}
        received = b""
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):  # noqa: SIM117
            with httpx.stream("POST", world.url + path, json=body) as reply:
                for chunk in reply.iter_raw():
                    received += chunk
        events = payloads(received.decode())
        assert events[-1] == {
            "error": {"message": "The engine failed.", "type": "server_error", "param": None, "code": "engine_error"}
        }
        assert "[DONE]" not in events
        until(lambda: world.plane.num_running == 0)
        assert world.get("/livez").status_code == 200


def test_the_official_client_raises_when_a_stream_fails() -> None:
    with a_world(Script(fail_after=4, failure=EngineError("The engine failed."), gap_s=0.01)) as world:
        text = ""
        with pytest.raises(openai.APIError, match="The engine failed"):
            for event in world.openai().completions.create(model=MODEL, prompt="hi", stream=True):
                text += event.choices[0].text
        assert text == "hello w"


def test_a_failure_before_the_first_token_is_a_plain_error() -> None:
    with a_world(Script(fail_after=0, failure=NoCapacity("gone", retry_after_s=2.0), queue_s=0.05)) as world:
        reply = world.complete(stream=True)
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "2"
    assert reply.json()["error"]["code"] == "no_capacity"


def test_a_queued_stream_hears_where_it_stands_and_the_official_client_skips_it() -> None:
    with a_world(Script(queue_s=0.4), pace=QUICK) as world:
        body = {"model": MODEL, "prompt": "hi", "stream": True}
        with httpx.stream("POST", world.url + "/v1/completions", json=body) as reply:
            text = "".join(reply.iter_text())
        assert text.startswith(": queue position=3 wait_s=1.2\n")
        assert not text.split("data:")[0].count("\n\n")  # no blank line: it would be an empty event
        stream = world.openai().completions.create(model=MODEL, prompt="hi", stream=True)
        assert "".join(event.choices[0].text for event in stream) == "hello world"


def test_a_silent_stream_is_kept_alive() -> None:
    with a_world(Script(text="ab", gap_s=0.3), pace=QUICK) as world:
        text = world.complete(stream=True).text
    assert text.count(": waiting\n") >= 3
    assert "".join(event["choices"][0]["text"] for event in payloads(text)[:-1]) == "ab"


def test_a_slow_reader_costs_a_bounded_buffer_and_gets_everything() -> None:
    with a_world(Script(text="word " * 100, frames=(50,))) as world:
        # 20 choices of 500 events: about 2 MB of events for a client that does not read
        client = send(world, receive_buffer=4096, stream=True, n=20)
        until(lambda: len(world.plane.submitted) == 1 and world.plane.num_running == 0)
        time.sleep(0.2)
        (connection,) = world.server.server_state.connections
        unsent = world.on_loop(lambda: connection.transport.get_write_buffer_size())
        assert unsent < 72 << 10
        (reply,) = world.gateway.replies
        rendered = sum(rendering.at for rendering in reply.exchange.renderings)
        assert rendered < 3_000  # of 10,000 tokens: the rest waits in the journals
        assert world.complete().status_code == 200  # nobody else waits
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            piece = client.recv(1 << 20)
            assert piece
            received += piece
        client.close()
        assert received.count(b'"finish_reason":"length"') == 20


def test_a_client_that_stops_reading_is_cut_off() -> None:
    pace = Pace(period_s=0.05, stall_s=0.3)
    with a_world(Script(text="word " * 100, frames=(5,), gap_s=0.01), pace=pace) as world:
        client = send(world, receive_buffer=4096, stream=True, n=100)
        until(lambda: world.plane.num_running == 100)
        until(lambda: world.plane.num_running == 0 and not world.gateway.replies)
        until(lambda: not world.server.server_state.connections)
        with pytest.raises(ConnectionResetError):
            while client.recv(1 << 20):
                pass
        client.close()


def test_the_first_token_leaves_at_once() -> None:
    with a_world(Script(text="ab", gap_s=0.5)) as world:
        client = send(world, stream=True, ignore_eos=False)
        begun = time.monotonic()
        received = b""
        while b"data:" not in received:
            received += client.recv(4096)
        assert time.monotonic() - begun < 0.25
        client.close()


def test_requests_of_a_gateway_that_ends_are_told_so() -> None:
    with a_world(Script(text="word " * 100, gap_s=0.05)) as world:
        client = send(world, stream=True)
        until(lambda: world.plane.num_running == 1)
        world.server._drain_s = 0.1
        world.stop()
        received = b""
        while piece := client.recv(1 << 16):
            received += piece
        client.close()
        assert payloads(received.decode().replace("\r", ""))[-1]["error"]["message"] == "The gateway is shutting down."
        assert not received.endswith(b"0\r\n\r\n")
