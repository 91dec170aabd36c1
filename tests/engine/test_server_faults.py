"""The replica's front under several gateways, lost connections, hostile frames and its own failures."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import wire
from serving.config import EngineSettings
from serving.engine.server import ReplicaServer
from tests.engine.client import Client
from tests.engine.test_server import wait_until_idle
from tests.tiny import tiny_model_folder

LONG = 400
BIG = 20 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_bytes(b"x" * BIG)
    return folder


@contextlib.contextmanager
def running(folder: Path, path: Path) -> Iterator[ReplicaServer]:
    settings = EngineSettings(
        model_dir=str(folder),
        served_model_name="tiny",
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_bytes=1 << 25,
        num_threads=1,
    )
    server = ReplicaServer(settings, replica_id="r0", secret=b"secret", listen=f"unix:{path}/s", exits_on_failure=False)
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServer]:
    with running(folder, tmp_path_factory.mktemp("socket")) as server:
        yield server


@pytest.fixture
def client(server: ReplicaServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
    wait_until_idle(server)


# --- permits ------------------------------------------------------------------------------------


def test_many_gateways_together_cannot_overfill_a_replica(server: ReplicaServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(8)]
        assert sum(client.granted for client in clients) > 12, "permits are promises that may clash"
        for client in clients:
            for handle in range(client.granted):
                client.submit(handle, [1, 2], max_tokens=LONG)
        scheduler = server.core.scheduler
        most = 0
        for client in clients:
            started = time.monotonic()
            client.until(lambda started=started: time.monotonic() > started + 0.1)
            most = max(most, scheduler.num_running + scheduler.num_waiting)
        assert 8 <= most <= 3 * 4
        rejects = [reject.code for client in clients for reject in client.rejects.values()]
        assert rejects and set(rejects) == {"overfull"}
    wait_until_idle(server, timeout_s=10.0)


def test_a_gateway_that_comes_late_gets_its_turn(server: ReplicaServer) -> None:
    with Client(server.address) as first:
        sent = 0
        with Client(server.address, shake_hands=False) as late:
            while sent < first.granted:
                first.submit(sent, [1, 2], max_tokens=30)
                sent += 1
            late.shake_hands(b"secret")  # returns when it has a permit
            late.submit(1, [1, 2], max_tokens=1)
            late.until(lambda: 1 in late.finished)
        first.until(lambda: len(first.finished) == sent)
    wait_until_idle(server)


def test_orphans_take_the_place_of_new_rows(server: ReplicaServer) -> None:
    """Else a gateway that reconnects again and again could heap up rows without bound."""
    scheduler = server.core.scheduler
    most = 0
    for number in range(6):
        with contextlib.suppress(AssertionError), Client(server.address, shake_hands=False) as client:
            client.sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                client.shake_hands(b"secret")
            for handle in range(client.granted):
                client.submit(handle, [1, 2], max_tokens=LONG, is_keyed=True, request_id=f"{number}")
            time.sleep(0.02)
        most = max(most, scheduler.num_running + scheduler.num_waiting)
    assert most <= 3 * 4
    wait_until_idle(server, timeout_s=20.0)


# --- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": -(2**40)}, "max_tokens must be at least 1"),
        ({"stop_token_ids": (2**40,)}, "stop_token_ids: token id 1099511627776 is not in 0.."),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: token id -1"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids has 65 entries, the limit is 64"),
        ({"logit_bias": ((10**6, 1.0),)}, "logit_bias: token id 1000000"),
        ({"allowed_token_ids": (0, 10**6)}, "allowed_token_ids: token id 1000000"),
        ({"logprobs": 10**6}, "logprobs must be 0 to 20, got 1000000"),
        ({"resume": (5, 6), "max_tokens": 2}, "max_tokens is 2; 2 are there already"),
    ],
)
def test_what_would_bring_down_the_step_loop_is_rejected(
    server: ReplicaServer, client: Client, fields: dict[str, object], words: str
) -> None:
    client.submit(1, [1, 2], **fields)
    client.until(lambda: 1 in client.rejects)
    assert words in client.rejects[1].message
    assert len(client.completion(2, [1, 2], max_tokens=3)) == 3
    assert server.failure is None


@pytest.mark.parametrize("handle", [-1, 2**32, 2**60])
def test_a_handle_that_is_no_u32_costs_the_connection_only(server: ReplicaServer, handle: int) -> None:
    with Client(server.address) as client:
        client.submit(handle, [1, 2])
        with pytest.raises(ConnectionError):
            while True:
                client.receive()
    assert server.health()[0]


def test_extreme_values_within_the_types_are_survived(server: ReplicaServer, client: Client) -> None:
    extremes = {"seed": 2**64 - 1, "choice": 2**40, "top_k": 2**40, "min_tokens": 2**40, "max_tokens": 2**40}
    client.submit(1, [1, 2], temperature=1.0, priority=2**60, **extremes)
    client.submit(2, [1, 2], temperature=float("nan"), top_p=float("nan"), max_tokens=3, priority=-(2**60))
    client.until(lambda: client.finished.keys() == {1, 2})
    assert len(client.tokens[1]) == 510
    assert server.failure is None


def test_an_asset_larger_than_a_connection_may_have_unsent_arrives(client: Client) -> None:
    """A tokenizer of 17 MB used to end the connection, each time anew."""
    client.send(wire.AssetRequest("chat_template.jinja"))
    size = 0
    while size < BIG:
        message = client.receive()
        if isinstance(message, wire.Asset):
            assert message.total == BIG and message.offset == size
            size += len(message.data)


# --- finding keyed rows -------------------------------------------------------------------------


def lose_a_keyed_row(server: ReplicaServer, request_id: str, max_tokens: int = LONG) -> list[int]:
    """Tokens read before the connection was lost."""
    with Client(server.address) as lost:
        lost.submit(1, [4, 4], max_tokens=max_tokens, is_keyed=True, request_id=request_id)
        lost.until(lambda: len(lost.tokens.get(1, [])) >= 5)
        return list(lost.tokens[1])


def test_of_two_who_find_a_row_at_once_the_last_gets_it_and_the_first_an_answer(server: ReplicaServer) -> None:
    seen = lose_a_keyed_row(server, "twice")
    with Client(server.address) as client:
        client.sock.sendall(b"".join(wire.encode(wire.Find(handle, "twice", 0, len(seen))) for handle in (7, 8)))
        client.until(lambda: 8 in client.finished and 7 in client.rejects)
        assert len(seen) + len(client.tokens[8]) == LONG
        assert client.rejects[7].code == "taken_over"
    wait_until_idle(server)


def test_a_row_that_is_taken_over_is_not_left_with_its_first_reader(server: ReplicaServer) -> None:
    with Client(server.address) as first, Client(server.address) as second:
        first.submit(1, [4, 4], max_tokens=LONG, is_keyed=True, request_id="contested")
        first.until(lambda: len(first.tokens.get(1, [])) >= 5)
        second.send(wire.Find(9, "contested", 0, 5))
        first.until(lambda: 1 in first.rejects)
        assert first.rejects[1].code == "taken_over"
        second.until(lambda: 9 in second.finished)
        assert first.tokens[1][:5] + second.tokens[9] == first.completion(2, [4, 4], max_tokens=LONG)
    wait_until_idle(server)


def test_a_row_whose_finder_dies_too_can_be_found_again(server: ReplicaServer, client: Client) -> None:
    whole = client.completion(1, [4, 4], max_tokens=LONG)
    seen = lose_a_keyed_row(server, "thrice")
    for _ in range(3):
        with Client(server.address) as finder:
            finder.send(wire.Find(5, "thrice", 0, len(seen)))
            finder.until(lambda finder=finder: len(finder.tokens.get(5, [])) >= 3)
            seen += finder.tokens[5]
        with Client(server.address) as hasty:  # dies before its answer
            hasty.send(wire.Find(5, "thrice", 0, len(seen)))
    client.send(wire.Find(50, "thrice", 0, len(seen)))
    client.until(lambda: 50 in client.finished or 50 in client.rejects)
    assert seen + client.tokens.get(50, []) == whole


def test_a_find_that_is_cancelled_at_once_leaves_nothing(server: ReplicaServer) -> None:
    seen = lose_a_keyed_row(server, "cancelled")
    with Client(server.address) as client:
        client.sock.sendall(wire.encode(wire.Find(3, "cancelled", 0, len(seen))) + wire.encode(wire.Cancel([3])))
        wait_until_idle(server)
        client.send(wire.Find(4, "cancelled", 0, len(seen)))
        client.until(lambda: 4 in client.rejects)


def test_a_rejected_keyed_row_is_not_held(client: Client) -> None:
    client.submit(1, [1, 2], max_tokens=0, is_keyed=True, request_id="never")
    client.submit(2, [1] * 600, max_tokens=1, is_keyed=True, request_id="never")
    client.until(lambda: client.rejects.keys() == {1, 2})
    client.send(wire.Find(3, "never", 0, 0))
    client.until(lambda: 3 in client.rejects)


def test_a_finder_who_claims_to_have_more_than_there_is_gets_nothing(server: ReplicaServer) -> None:
    lose_a_keyed_row(server, "ahead", max_tokens=60)
    with Client(server.address) as client:
        client.send(wire.Find(1, "ahead", 0, 100_000))
        client.until(lambda: 1 in client.rejects)
    wait_until_idle(server)


# --- its own failures -----------------------------------------------------------------------------


def test_an_output_that_cannot_be_told_ends_the_replica(folder: Path, tmp_path: Path) -> None:
    """Its readers would miss a token and go on with the next."""
    with running(folder, tmp_path) as server, Client(server.address) as client:
        server._handover.keep = lambda output: 1 / 0  # type: ignore[method-assign]
        client.submit(1, [1, 2], max_tokens=LONG)
        with pytest.raises(ConnectionError):
            while True:
                client.receive()
        healthy, why = server.health()
        assert not healthy and "ZeroDivisionError" in why


def test_a_step_that_fails_closes_the_connections(folder: Path, tmp_path: Path) -> None:
    with running(folder, tmp_path) as server, Client(server.address) as client:
        server.core._executor.submit = lambda plan: 1 / 0  # type: ignore[attr-defined]
        client.submit(1, [1, 2], max_tokens=LONG)
        with pytest.raises(ConnectionError):
            while True:
                client.receive()
        assert not server.health()[0]


def test_a_replica_that_cannot_listen_does_not_call_itself_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(server: ReplicaServer) -> None:
        raise OSError("no listening today")

    monkeypatch.setattr(ReplicaServer, "_open", refuse)
    with pytest.raises(OSError, match="no listening today"), running(folder, tmp_path):
        pass


def test_connections_that_arrive_while_it_closes_leak_no_socket(folder: Path, tmp_path: Path) -> None:
    """asyncio forgets a socket whose server closes between its acceptance and its transport."""
    is_over = threading.Event()

    def storm() -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(0.2)
                stranger.connect(f"{tmp_path}/s")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with running(folder, tmp_path):
            threads = [threading.Thread(target=storm) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.1)
        is_over.set()
        for thread in threads:
            thread.join()
        gc.collect()
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []
