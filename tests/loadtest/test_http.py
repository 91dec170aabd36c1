"""The client's HTTP: connections are used again, bounds hold, each kind of failure has its name."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gevent.socket
import pytest

from loadtest import failures
from loadtest.call import Answer, Call, send
from loadtest.failures import RequestFailed
from loadtest.http import MAX_HEAD_BYTES, Pool, Target

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@contextmanager
def server(*answers: bytes, closes: bool = False) -> Iterator[tuple[Pool, list[int]]]:
    """A pool for a server that gives these answers, one per request; `closes`: and ends the connection after each.

    The list holds how many requests each connection brought.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    served: list[int] = []
    left = list(answers)

    def serve() -> None:
        while left:
            try:
                sock = listener.accept()[0]
            except OSError:
                return
            served.append(0)
            with sock:
                while left and b"\r\n\r\n" in (seen := sock.recv(65536)) and seen:
                    served[-1] += 1
                    sock.sendall(left.pop(0))
                    if closes:
                        break

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    pool = Pool(Target(f"http://127.0.0.1:{listener.getsockname()[1]}"), timeout_s=0.3)
    try:
        yield pool, served
    finally:
        pool.close()
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        listener.close()
        thread.join(5)


def whole(pool: Pool) -> bytes:
    response = pool.post("/x", b"{}")
    pieces = []
    try:
        while piece := response.read()[0]:
            pieces.append(piece)
    finally:
        response.close()
    return b"".join(pieces)


def test_a_connection_is_used_again() -> None:
    with server(OK, OK, OK) as (pool, served):
        assert [whole(pool) for _ in range(3)] == [b"hi"] * 3
        assert served == [3]


def test_a_connection_that_the_server_closed_meanwhile_costs_no_request() -> None:
    with server(OK, OK, closes=True) as (pool, served):
        assert [whole(pool), whole(pool)] == [b"hi", b"hi"]
        assert served == [1, 1]


def test_chunked_bodies_and_bodies_that_end_with_the_connection() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x=y\r\nd\r\n0\r\n\r\n"
    with server(chunked, b"HTTP/1.1 200 OK\r\n\r\nto the end", closes=True) as (pool, _):
        assert whole(pool) == b"abcd"
        assert whole(pool) == b"to the end"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", failures.RESET),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", failures.RESET),
        (b"HTTP/1.1 200 OK\r\n", failures.RESET),
        (b"nonsense\r\n\r\n", failures.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (2 * MAX_HEAD_BYTES + 65536), failures.MALFORMED),
    ],
)
def test_broken_answers_have_names(answer: bytes, failure: str) -> None:
    with server(answer, closes=True) as (pool, _), pytest.raises(RequestFailed) as caught:
        whole(pool)
    assert caught.value.failure == failure


def test_silence_is_a_timeout_and_nobody_there_is_no_connection() -> None:
    with server(b"HTTP/1.1 200 OK\r\n", OK) as (pool, _), pytest.raises(RequestFailed) as caught:
        whole(pool)
    assert caught.value.failure == failures.TIMEOUT
    with gevent.socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with pytest.raises(RequestFailed) as caught:
            whole(Pool(Target(f"http://127.0.0.1:{free.getsockname()[1]}")))
    assert caught.value.failure == failures.CONNECT


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (SSE + b'data: {"choices":[{"text":"a"}]}\n\ndata: {"error": {"code": "boom"}}\n\n', failures.STREAM_ERROR),
        (SSE + b'data: {"choices":[{"text":"a"}]}\n\n', failures.TRUNCATED),
        (SSE + b"data: {\n\n", failures.MALFORMED),
        (OK, failures.MALFORMED),
        (b"HTTP/1.1 429 X\r\nContent-Length: 32\r\n\r\ncut off", "http_429"),
    ],
)
def test_broken_streams_have_names_and_keep_what_came_before(answer: bytes, failure: str) -> None:
    seen = Answer(Call(id=0, endpoint="completions", body=b"{}"), 0.0)
    with server(answer, closes=True) as (pool, _):
        send(seen, pool)
    assert seen.failure is not None and seen.failure.failure == failure
    assert len(seen.token_times) == answer.count(b'"text"')


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("https://api.example.com/v1/", "https://api.example.com"),
        ("http://h/openai/v1", "http://h/openai"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_targets(url: str, wanted: str) -> None:
    assert Target(url).url == wanted


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://user@host", "http://host/?key=1"])
def test_what_is_no_target(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|user nor query"):
        Target(url)
