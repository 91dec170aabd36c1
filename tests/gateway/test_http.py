"""Hostile bytes: bounded before they are collected, answered in OpenAI's shape, closed cleanly."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.gateway.world import Script, World, a_world, until

BODY = b'{"prompt": "hi"}'


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with a_world(max_body_bytes=100_000) as running:
        yield running
        assert running.get("/livez").status_code == 200


def exchange(world: World, *pieces: bytes, timeout_s: float = 5.0) -> bytes:
    """What the server answers until it closes; b"" when it closes without a word."""
    with socket.create_connection(("127.0.0.1", world.port), timeout_s) as client:
        received = b""
        try:
            for piece in pieces:
                client.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        while piece := client.recv(1 << 16):
            received += piece
    return received


def error(reply: bytes) -> tuple[int, str]:
    """(status, code) of an error reply, checked to be one."""
    head, _, body = reply.partition(b"\r\n\r\n")
    found = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert b"connection: close" in head.lower()
    assert b"\r\nx-request-id: req-" in head
    assert not any(word in found["message"] for word in ("Traceback", "0x", "/serving/", ".py"))
    return int(head.split()[1]), found["code"]


def post(*headers: bytes, body: bytes = b"") -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (post(b"X: " + b"a" * (1 << 20)), 431, "headers_too_large"),
        (post(*[b"X: " + b"a" * 500] * 40), 431, "headers_too_large"),
        (post(*[b"X: 1"] * 10_000), 431, "headers_too_large"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "url_too_long"),
        (b"GET /" + b"a" * (64 << 10) + b" HTTP/1.1\r\n\r\n", 414, "url_too_long"),
        (post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello"), 400, "malformed_http"),
        (post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), 400, "malformed_http"),
        (post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, "malformed_http"),
        (post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"), 400, "malformed_http"),
        (post(b"Content-Length: -5"), 400, "malformed_http"),
        (post(b"Content-Length: 99999999999999999999999"), 400, "malformed_http"),
        (post(b"Transfer-Encoding: chunked", body=b"zz\r\n"), 400, "malformed_http"),
        (post(b"Content-Length: 100001"), 413, "payload_too_large"),
        (post(b"Content-Length: 100001", body=b"x" * 100_001), 413, "payload_too_large"),
        (post(b"Transfer-Encoding: chunked", body=b"186a1\r\n" + b"x" * 100_001), 413, "payload_too_large"),
        (post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 400, "malformed_http"),
        (post(b"X: a", b" folded"), 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\nX : 1\r\n\r\n", 400, "malformed_http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "malformed_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400, "malformed_http"),
        (b"\x80\x04\x95garbage\r\n\r\n", 400, "malformed_http"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "malformed_http"),
        (b"CONNECT x:1 HTTP/1.1\r\n\r\n", 400, "malformed_http"),
    ],
)
def test_refused(world: World, request_bytes: bytes, status: int, code: str) -> None:
    assert error(exchange(world, request_bytes)) == (status, code)
    until(lambda: len(world.server.server_state.connections) == 0)


def test_an_endless_chunked_body_is_cut_at_the_limit(world: World) -> None:
    chunks = [b"1000\r\n" + b"x" * 4096 + b"\r\n"] * 200
    assert error(exchange(world, post(b"Transfer-Encoding: chunked"), *chunks)) == (413, "payload_too_large")
    until(lambda: world.gateway.admission.body_bytes == 0)


def test_limits_leave_room_for_honest_requests(world: World) -> None:
    headers = [b"X-%d: " % number + b"a" * 100 for number in range(90)]
    body = b'{"prompt": "hi", "user": "%s"}' % (b"u" * 4000)
    reply = exchange(world, post(*headers, b"Connection: close", b"Content-Length: %d" % len(body), body=body))
    assert reply.startswith(b"HTTP/1.1 200")


def test_compressed_bodies_are_not_accepted(world: World) -> None:
    reply = world.post("/v1/completions", raw=b"\x1f\x8b", content_encoding="gzip")
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("size", [1, 7, 100])
def test_bytes_may_arrive_in_any_pieces(world: World, size: int) -> None:
    data = post(b"Connection: close", b"Content-Length: %d" % len(BODY), body=BODY)
    reply = exchange(world, *[data[at : at + size] for at in range(0, len(data), size)])
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"hello world" in reply


def test_one_connection_serves_many_requests(world: World) -> None:
    data = post(b"Content-Length: %d" % len(BODY), body=BODY)
    last = post(b"Connection: close", b"Content-Length: %d" % len(BODY), body=BODY)
    assert exchange(world, data, data, data, last).count(b"HTTP/1.1 200") == 4


@pytest.mark.parametrize("size", [1, 40, 1000])
def test_an_offered_upgrade_is_declined_and_the_request_served(world: World, size: int) -> None:
    """As curl --http2 and Java's client send every request; the body is still HTTP/1.1's."""
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ")
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    data = post(*offer, b"Content-Length: %d" % len(BODY), body=BODY)
    data += post(*offer, b"Transfer-Encoding: chunked", body=chunked)
    data += b"GET /livez HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    data += post(b"Connection: close", b"Content-Length: %d" % len(BODY), body=BODY)
    reply = exchange(world, *[data[at : at + size] for at in range(0, len(data), size)])
    assert reply.count(b"HTTP/1.1 200") == 4 and reply.count(b"hello world") == 3
    over = exchange(world, post(*offer, b"Transfer-Encoding: chunked", body=b"186a1\r\n" + b"x" * 100_001))
    assert error(over) == (413, "payload_too_large")


def test_refusals_are_counted(world: World) -> None:
    def count() -> int:
        return int(world.gateway.metrics.responses["other", "431"])

    before = count()
    exchange(world, post(*[b"X: 1"] * 10_000))
    assert count() == before + 1


def test_pipelining_is_capped(world: World) -> None:
    exchange(world, post(b"Content-Length: %d" % len(BODY), body=BODY) * 1000)
    until(lambda: world.plane.num_running == 0 and not world.gateway.replies)
    assert len(world.plane.submitted) < 100


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/v1/nope", 404), ("GET", "/v1/models/nope", 404),
        ("GET", "/v1/models/../../etc/passwd", 404), ("GET", "/%2e%2e/etc/passwd", 404),
        ("POST", "//v1/completions", 404), ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405), ("PUT", "/v1/chat/completions", 405),
        ("TRACE", "/livez", 405), ("DELETE", "/v1/models", 405),
    ],
)  # fmt: skip
def test_paths_and_methods(world: World, method: str, path: str, status: int) -> None:
    reply = exchange(world, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert error(reply)[0] == status
    assert b"x-request-id: req-" in reply


def test_request_ids_of_clients_are_kept_when_harmless(world: World) -> None:
    assert world.post("/v1/completions", {}, x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    for harmful in ("a b", "x" * 200, "<script>"):
        assert world.post("/v1/completions", {}, x_request_id=harmful).headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b'{"prompt": "hi", "prompt": "ho"}', "invalid_json", None),
        (b'{"prompt": "\\ud800"}', "invalid_value", "prompt"),
        (b'{"prompt": "hi", "temperature": NaN}', "invalid_type", "temperature"),
        (b'{"prompt": "hi", "n": true}', "invalid_type", "n"),
        (b'{"prompt": "hi", "\\ud800": 1}', "unsupported_parameter", "\ud800"),
        (b'{"prompt": "hi", "stop": "\\ud800"}', "invalid_value", "stop"),
        (b'{"prompt": "hi", "a\\r\\nb": 1}', "unsupported_parameter", "a\r\nb"),
    ],
)
def test_hostile_bodies(world: World, raw: bytes, code: str, param: str | None) -> None:
    reply = world.post("/v1/completions", raw=raw)
    assert reply.status_code == 400
    found = reply.json()["error"]
    assert (found["code"], found["param"], found["type"]) == (code, param, "invalid_request_error")


def test_slow_heads_and_bodies_are_refused_at_their_deadline() -> None:
    with a_world(header_timeout_s=0.3, body_timeout_s=0.3) as world:
        assert exchange(world) == b""  # asked nothing, hears nothing
        assert error(exchange(world, b"POST /v1/completions HTTP/1.1\r\nHo")) == (408, "request_timeout")
        assert error(exchange(world, post(b"Content-Length: 100", body=b"{"))) == (408, "request_timeout")
        until(lambda: world.gateway.admission.body_bytes == 0)
        with socket.create_connection(("127.0.0.1", world.port)) as client:  # one byte at a time does not help
            begun = time.monotonic()
            client.settimeout(0.02)
            received = b""
            client.sendall(b"GET /livez HTTP/1.1\r\nX: ")
            while not received:
                client.sendall(b"a")
                try:
                    received = client.recv(4096)
                except TimeoutError:
                    continue
            assert error(received)[0] == 408
            assert 0.25 < time.monotonic() - begun < 2


def test_slow_bodies_take_no_place_from_whole_ones() -> None:
    with a_world() as world:
        world.gateway.admission._max_preparing = 2
        slow = [socket.create_connection(("127.0.0.1", world.port)) for _ in range(20)]
        for client in slow:
            client.sendall(post(b"Content-Length: 100", body=b"{"))
        until(lambda: world.gateway.admission.body_bytes == 20)
        assert world.complete().status_code == 200
        for client in slow:
            client.close()
        until(lambda: world.gateway.admission.body_bytes == 0)


def test_bodies_beyond_what_memory_is_for_them_are_refused() -> None:
    with a_world() as world:
        world.gateway.admission._max_body_bytes = 1000
        reply = world.complete(user="x" * 2000)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert world.gateway.admission.body_bytes == 0
        assert world.complete().status_code == 200


def test_deadlines_spare_those_who_wait_for_an_answer() -> None:
    with a_world(Script(queue_s=0.5), header_timeout_s=0.2, body_timeout_s=0.2) as world:
        assert world.complete().status_code == 200
