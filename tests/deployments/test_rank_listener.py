"""How ranks are let in: real sockets, strangers among them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from serving.deployments import rank_listener
from serving.deployments.rank_listener import RankListener, introduce
from serving.errors import ModelLoadError
from serving.wire import prove

SECRET = b"s" * 32


@pytest.fixture
def listener() -> Iterator[RankListener]:
    listener = RankListener("127.0.0.1", "gang-7", SECRET)
    yield listener
    listener.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def nothing(missing: set[int]) -> None:
    """Knows of no rank that will not come."""


def admit(
    listener: RankListener, num_ranks: int, timeout_s: float = 20.0, look: Callable[[set[int]], None] = nothing
) -> list[socket.socket]:
    return listener.admit(num_ranks, time.monotonic() + timeout_s, look)


def test_ranks_come_in_any_order_and_stand_in_theirs(listener: RankListener, pool: ThreadPoolExecutor) -> None:
    admitted = pool.submit(admit, listener, 3)
    theirs = {rank: introduce(listener.address, rank, "gang-7", SECRET) for rank in (3, 1, 2)}
    for rank, sock in enumerate(admitted.result(20), 1):
        with sock, theirs[rank] as other:
            other.sendall(bytes([rank]))
            assert sock.recv(1) == bytes([rank])
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert other.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.gettimeout() is None and other.gettimeout() is None


@pytest.mark.parametrize(
    ("rank", "gang", "secret"),
    [(1, "gang-7", b"t" * 32), (1, "gang-6", SECRET), (2, "gang-7", SECRET), (0, "gang-7", SECRET)],
    ids=["another secret", "another start", "a rank that is not expected", "rank 0 itself"],
)
def test_whoever_is_not_expected_stays_out(
    listener: RankListener, pool: ThreadPoolExecutor, rank: int, gang: str, secret: bytes
) -> None:
    admitted = pool.submit(admit, listener, 1)
    with pytest.raises(PermissionError, match="does not know the secret"):
        introduce(listener.address, rank, gang, secret)
    introduce(listener.address, 1, "gang-7", SECRET).close()
    [sock] = admitted.result(20)
    sock.close()


def test_a_rank_comes_once(listener: RankListener, pool: ThreadPoolExecutor) -> None:
    admitted = pool.submit(admit, listener, 2)
    first = introduce(listener.address, 1, "gang-7", SECRET)
    with pytest.raises(PermissionError):
        introduce(listener.address, 1, "gang-7", SECRET)
    second = introduce(listener.address, 2, "gang-7", SECRET)
    for sock in (first, second, *admitted.result(20)):
        sock.close()


def test_a_proof_does_not_work_twice(listener: RankListener, pool: ThreadPoolExecutor) -> None:
    """Every connection has a nonce of its own; what somebody overheard is worth nothing."""
    heard: Future[bytes] = Future()

    def relay(front: socket.socket) -> None:
        """Between a rank and the listener, taking notes."""
        rank, _ = front.accept()
        with rank, socket.create_connection(listener.address) as back:
            rank.sendall(back.recv(64))
            introduction = rank.recv(256)
            heard.set_result(introduction)
            back.sendall(introduction)
            rank.sendall(back.recv(64))

    admitted = pool.submit(admit, listener, 2)
    with socket.create_server(("127.0.0.1", 0)) as front:
        relayed = pool.submit(relay, front)
        introduce(front.getsockname(), 1, "gang-7", SECRET).close()
        relayed.result(20)
    with socket.create_connection(listener.address, timeout=20) as thief:
        nonce = thief.recv(64)
        assert len(nonce) == 32 and SECRET not in heard.result(20)
        thief.sendall(heard.result(20))
        assert thief.recv(64) == b""
    introduce(listener.address, 2, "gang-7", SECRET).close()
    for sock in admitted.result(20):
        sock.close()


def test_silent_strangers_keep_nobody_out(
    listener: RankListener, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are listened to at once, and some who say half a word."""
    monkeypatch.setattr(rank_listener, "MAX_STRANGERS", 8)
    admitted = pool.submit(admit, listener, 1)
    strangers = [socket.create_connection(listener.address, timeout=20) for _ in range(20)]
    for stranger in strangers[::2]:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
    introduce(listener.address, 1, "gang-7", SECRET).close()
    admitted.result(20)[0].close()
    for stranger in strangers:
        with stranger:
            assert len(stranger.recv(64)) <= 32


def test_a_gang_may_have_more_ranks_than_strangers_are_listened_to(
    listener: RankListener, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them come at once, and their introductions take a while."""
    monkeypatch.setattr(rank_listener, "MAX_STRANGERS", 2)
    ranks = range(1, 7)
    admitted = pool.submit(admit, listener, len(ranks))
    connections = {rank: socket.create_connection(listener.address, timeout=20) for rank in ranks}
    for rank, sock in connections.items():
        nonce, ours = sock.recv(32), bytes(32)
        proof = prove(SECRET, f"rank {rank} of gang-7", nonce, ours)
        sock.sendall(rank.to_bytes(4, "little") + ours + proof)
        assert len(sock.recv(32)) == 32, f"rank {rank} was sent away"
    for sock in (*admitted.result(20), *connections.values()):
        sock.close()


def test_who_does_not_introduce_himself_in_time_is_parted_with(
    listener: RankListener, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_listener, "GREETING_S", 0.3)
    admitted = pool.submit(admit, listener, 1)
    with socket.create_connection(listener.address, timeout=20) as stranger:
        assert len(stranger.recv(64)) == 32
        assert stranger.recv(64) == b""
    introduce(listener.address, 1, "gang-7", SECRET).close()
    admitted.result(20)[0].close()


def test_a_rank_does_not_believe_a_listener_without_the_secret(pool: ThreadPoolExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def deceive() -> None:
            sock, _ = impostor.accept()
            with sock:
                sock.sendall(b"n" * 32)
                sock.recv(256)
                sock.sendall(b"p" * 32)

        deceived = pool.submit(deceive)
        with pytest.raises(PermissionError, match="who listens on 127"):
            introduce(impostor.getsockname(), 1, "gang-7", SECRET)
        deceived.result(20)


def test_missing_ranks_are_named_after_the_deadline(listener: RankListener, pool: ThreadPoolExecutor) -> None:
    admitted = pool.submit(admit, listener, 3, 1.0)
    with introduce(listener.address, 2, "gang-7", SECRET) as early:
        with pytest.raises(ModelLoadError, match="rank 1, 3 of 4 did not connect in time"):
            admitted.result(20)
        assert early.recv(1) == b"", "who had come is sent away"


def test_what_is_known_of_a_missing_rank_ends_the_wait(listener: RankListener) -> None:
    def look(missing: set[int]) -> None:
        raise ModelLoadError(f"rank {missing.pop()} has died")

    begun = time.monotonic()
    with pytest.raises(ModelLoadError, match="rank 1 has died"):
        admit(listener, 1, look=look)
    assert time.monotonic() - begun < 5
