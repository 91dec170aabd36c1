"""The replica's end of the engine protocol, over a real socket and a real (tiny) model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import wire
from serving.config import EngineSettings
from serving.engine.server import ReplicaServer
from serving.errors import SettingsError
from tests.engine.client import Client
from tests.tiny import tiny_model_folder

LONG = 200  # tokens: many steps


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServer]:
    folder = tmp_path_factory.mktemp("server")
    settings = EngineSettings(
        model_dir=str(tiny_model_folder(folder / "model")),
        served_model_name="tiny",
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_bytes=1 << 25,
        num_threads=1,
    )
    server = ReplicaServer(
        settings, replica_id="r0", secret=b"secret", listen=f"unix:{folder}/s", exits_on_failure=False
    )
    server.start()
    yield server
    server.close()


@pytest.fixture
def client(server: ReplicaServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
    wait_until_idle(server)


def wait_until_idle(server: ReplicaServer, timeout_s: float = 5.0) -> None:
    """No rows, no blocks: nothing leaked."""
    deadline = time.monotonic() + timeout_s
    scheduler = server.core.scheduler
    while scheduler.num_running or scheduler.num_waiting or scheduler.pool.num_owned:
        assert time.monotonic() < deadline, "rows or blocks leaked"
        time.sleep(0.01)


def test_a_completion(client: Client) -> None:
    assert len(client.completion(1, [5, 6, 7], max_tokens=9)) == 9
    assert client.card.model == "tiny" and client.card.max_model_len == 512


def test_many_choices_share_the_replica_and_permits_bound_them(client: Client) -> None:
    for handle in range(1, 41):
        while client.granted < handle:
            client.take()
        client.submit(handle, [handle, 3], max_tokens=12)
    client.until(lambda: len(client.finished) == 40)
    assert all(len(tokens) == 12 for tokens in client.tokens.values())
    assert max(beat.num_waiting for beat in client.beats) <= 2 * 4
    assert not client.rejects


def test_a_submit_beyond_the_permits_is_rejected_not_queued(client: Client) -> None:
    for handle in range(client.granted + 3):
        client.submit(handle, [1, 2], max_tokens=LONG)
    client.until(lambda: len(client.rejects) >= 1)
    assert {reject.code for reject in client.rejects.values()} == {"not_granted"}


def test_resume_continues_where_the_journal_ends(client: Client) -> None:
    whole = client.completion(1, [9, 8, 7], max_tokens=20, temperature=1.0, seed=5)
    rest = client.completion(2, [9, 8, 7], max_tokens=20, temperature=1.0, seed=5, resume=tuple(whole[:7]))
    assert rest == whole[7:]


def test_cancel_frees_the_row_at_once(server: ReplicaServer, client: Client) -> None:
    client.submit(1, [1, 2, 3], max_tokens=LONG)
    client.until(lambda: len(client.tokens.get(1, [])) > 3)
    client.send(wire.Cancel([1]))
    wait_until_idle(server, timeout_s=0.25)
    assert 1 not in client.finished


def test_a_lost_connection_ends_its_rows(server: ReplicaServer) -> None:
    with Client(server.address) as client:
        client.submit(1, [1, 2, 3], max_tokens=400)
        client.until(lambda: len(client.tokens.get(1, [])) > 3)
    wait_until_idle(server, timeout_s=3.0)


def test_a_keyed_row_runs_on_and_is_found_again(server: ReplicaServer, client: Client) -> None:
    whole = client.completion(1, [4, 4], max_tokens=60, logprobs=2)
    with Client(server.address) as lost:
        lost.submit(1, [4, 4], max_tokens=60, logprobs=2, is_keyed=True, request_id="keyed")
        lost.until(lambda: len(lost.tokens.get(1, [])) >= 5)
        seen = list(lost.tokens[1])
    time.sleep(0.05)
    client.send(wire.Find(77, "keyed", 0, len(seen)))
    client.until(lambda: 77 in client.finished)
    assert seen + client.tokens[77] == whole
    client.send(wire.Find(78, "unheard of", 0, 0))
    client.until(lambda: 78 in client.rejects)
    assert client.rejects[78].code == "not_found"


def test_beats_come_ten_times_a_second_while_steps_run(client: Client) -> None:
    client.submit(1, [1, 2], max_tokens=400)
    started = time.monotonic()
    client.until(lambda: time.monotonic() - started > 1.0)
    assert len(client.beats) >= 10
    assert client.beats[-1].step > 0 and client.beats[-1].ranks[0].rank == 0
    client.send(wire.Cancel([1]))


def test_some_beats_carry_counts_the_first_of_a_connection_among_them(server: ReplicaServer, client: Client) -> None:
    first = client.beats[0].stats
    assert first is not None and {name for name, _ in first.phases} >= {"weights", "kv_cache"}
    assert first.weights_read_bytes > 0
    client.completion(1, [7] * 40, max_tokens=10)
    client.until(lambda: any(beat.stats is not None and beat.stats.steps > first.steps for beat in client.beats[1:]))
    wait_until_idle(server)
    client.until(lambda: (told := client.beats[-1].stats) is not None and told.steps == server.core.num_steps)
    told = client.beats[-1].stats
    assert told is not None and told.step_counts == server.core.scheduler.tally.step_seconds.counts
    assert told.prefix_queried - first.prefix_queried == 40
    assert told.prefill_tokens + told.decode_tokens - first.prefill_tokens - first.decode_tokens == 40 + 10 - 1
    client.until(lambda: len(client.beats) >= 14)
    assert 2 <= sum(beat.stats is not None for beat in client.beats) <= 5


def test_what_can_never_fit_is_rejected_with_the_numbers(client: Client) -> None:
    client.submit(1, list(range(1, 101)) * 6, max_tokens=1)
    client.until(lambda: 1 in client.rejects)
    assert client.rejects[1].code == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in client.rejects[1].message
    client.submit(2, [client.card.tokenizer_size], max_tokens=1)
    client.until(lambda: 2 in client.rejects)
    assert "is not in 0.." in client.rejects[2].message


def test_assets_arrive_whole(client: Client) -> None:
    assert "tokenizer.json" in client.card.assets
    for name, sha256 in client.card.assets.items():
        client.send(wire.AssetRequest(name))
        data = b""
        while True:
            message = client.receive()
            if isinstance(message, wire.Asset):
                assert message.offset == len(data)
                data += message.data
                if len(data) >= message.total:
                    break
        assert hashlib.sha256(data).hexdigest() == sha256


@pytest.mark.parametrize(
    "hostile",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(40),
        b"\x80\x04\x95" + bytes(64),  # a pickle
        bytes(64),
        b"\xff\xff\xff\xff" + bytes(64),
        wire.encode(wire.Cancel([1])),
        wire.encode(wire.Hello(99, "old", bytes(16))),
        wire.encode(wire.Hello(1, "short", b"x")),
        wire.encode(wire.Hello(1, "g", bytes(16))) + wire.encode(wire.Prove(bytes(32))),
    ],
)
def test_who_does_not_prove_the_secret_is_cut_off(server: ReplicaServer, hostile: bytes) -> None:
    with Client(server.address, shake_hands=False) as stranger:
        stranger.sock.sendall(hostile)
        with pytest.raises((ConnectionError, OSError)):
            while True:
                assert isinstance(stranger.receive(), wire.HelloReply)
    assert server.health()[0]


def test_a_gateway_that_breaks_the_protocol_is_cut_off(server: ReplicaServer) -> None:
    with Client(server.address) as client:
        client.send(wire.Submit(1, "r", b"\1\2\3", b"", wire.SamplingParams()))
        with pytest.raises((ConnectionError, OSError)):
            while True:
                client.receive()
    wait_until_idle(server)


def test_drain_refuses_new_work_and_lets_rows_finish(tmp_path: Path) -> None:
    settings = EngineSettings(
        model_dir=str(tiny_model_folder(tmp_path / "model")),
        served_model_name="tiny",
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_bytes=1 << 24,
        num_threads=1,
    )
    server = ReplicaServer(
        settings, replica_id="r0", secret=b"secret", listen=f"unix:{tmp_path}/s", exits_on_failure=False
    )
    server.start()
    with Client(server.address) as client:
        client.submit(1, [1, 2], max_tokens=60)
        client.until(lambda: 1 in client.cached)
        server.drain(timeout_s=10.0)
        assert server.core.scheduler.num_running == 0
        client.submit(2, [1, 2], max_tokens=2)
        client.until(lambda: 2 in client.rejects and bool(client.beats) and client.beats[-1].state == "draining")
        assert client.rejects[2].code == "draining"
        assert len(client.tokens[1]) == 60
    server.close()


def test_one_address_has_one_replica(server: ReplicaServer) -> None:
    with pytest.raises(SettingsError, match="another process listens"):
        ReplicaServer(server.settings, replica_id="r1", secret=b"s", listen=server.address)
