"""The life and death of a gang, with real processes: what ends it, how soon, and what rank 0 says about it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from serving.engine import gang as gang_module
from serving.engine import worker as worker_module
from serving.engine.assembly import assemble
from serving.engine.executor import GangExecutor
from serving.engine.gang import Gang, GangFailed
from serving.engine.plan import NO_IDS, NewRow, Plan
from serving.engine.rank_wire import Pulse, message_frame, plan_frame
from serving.engine.server import ReplicaServer
from serving.errors import ModelLoadError, SettingsError
from serving.types import SamplingParams
from tests.engine.client import Client
from tests.engine.gangs import Ready, forked, forks, gang_of, gang_settings, is_alive
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("gang"), num_hidden_layers=3)


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on how long a silence may be."""
    monkeypatch.setattr(gang_module, "SILENCE_S", 0.7)


class Guard:
    """Whom a gang tells that it is over."""

    def __init__(self, ready: Ready, limit_s: float = 60.0) -> None:
        self.is_over = threading.Event()
        self.why = ""
        assert ready.gang is not None
        ready.gang.guard(self._hear, lambda: limit_s)

    def _hear(self, failure: GangFailed) -> None:
        self.why = str(failure)
        self.is_over.set()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def one_token_plan() -> Plan:
    ones, slot = np.ones(1, np.int32), np.zeros(1, np.int32)
    row = NewRow(0, 1, np.array([5], np.int32), SamplingParams(temperature=0.0))
    updates = np.array([[0, 0, 1]], np.int32)
    return Plan(0, slot, ones, slot, ones, NO_IDS, updates, ones, (row,), np.array([5], np.int32))


# --- dying and hanging ----------------------------------------------------------------------------


def test_the_death_of_a_rank_ends_the_gang_at_once(folder: Path) -> None:
    with gang_of(folder, 2, 2) as ready:
        guard = Guard(ready)
        begun = time.monotonic()
        os.kill(ready.pids[1], signal.SIGKILL)
        assert guard.is_over.wait(5)
        assert time.monotonic() - begun < gang_module.SILENCE_S
        assert re.fullmatch(rf"rank 2 \(pid {ready.pids[1]} on .+\) is gone", guard.why)
        until(lambda: not any(map(is_alive, ready.pids)))


def test_a_stopped_rank_is_silent_and_is_killed(folder: Path) -> None:
    with gang_of(folder, 2, 1) as ready:
        guard = Guard(ready)
        begun = time.monotonic()
        os.kill(ready.pids[0], signal.SIGSTOP)
        assert guard.is_over.wait(10)
        assert 1.0 < time.monotonic() - begun < 6.0
        assert re.match(rf"rank 1 \(pid {ready.pids[0]} on .+\) has been silent for", guard.why)
        until(lambda: not is_alive(ready.pids[0]))


def test_rank_0_accuses_nobody_after_it_has_stood_still_itself(folder: Path, short_patience: None) -> None:
    with gang_of(folder, 2, 1) as ready:
        guard = Guard(ready)
        os.kill(ready.pids[0], signal.SIGSTOP)
        ctypes.PyDLL(None).usleep(800_000)  # holds the interpreter: no thread of ours runs
        os.kill(ready.pids[0], signal.SIGCONT)
        assert not guard.is_over.wait(0.3), guard.why


def test_a_step_that_is_too_old_ends_the_gang(folder: Path, short_patience: None) -> None:
    """The last stage waits for hidden states that never come, and its beats go on."""
    with gang_of(folder, 1, 2) as ready:
        guard = Guard(ready, limit_s=0.4)
        assert ready.gang is not None
        ready.gang.tell_all(plan_frame(one_token_plan().encode()))
        assert guard.is_over.wait(10)
        assert "the running step of rank 1" in guard.why and "0.4 s are its limit" in guard.why


def test_of_a_step_that_waits_the_silent_rank_is_named(short_patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's step is old because it waits for rank 2, which has not yet been silent for long enough itself."""
    monkeypatch.setattr(gang_module, "_IDLE_S", 0.1)
    pairs = [socket.socketpair() for _ in range(2)]
    gang = Gang([ours for ours, _ in pairs])
    over = threading.Event()
    gang.guard(lambda failure: over.set(), lambda: 1.0)

    def beat(rank: int, age_s: float) -> None:
        with contextlib.suppress(BrokenPipeError):
            pairs[rank - 1][1].sendall(message_frame(Pulse(False, 7, age_s, 100 + rank, "host", "elsewhere")))

    for tick in range(200):
        beat(1, age_s=0.0 if tick < 16 else 2.0)
        if tick < 10:
            beat(2, age_s=0.0)
        if over.wait(0.05):
            break
    assert re.search(r"rank 2 \(pid 102 on host\) has been silent for 0\.\d s", str(gang.failure))
    for _, theirs in pairs:
        theirs.close()


def test_whoever_comes_when_it_is_over_is_told_at_once() -> None:
    """Rank 0's share may come up just when another rank dies: nothing would end its waits otherwise."""
    gang = Gang([])
    gang.end("rank 1 is gone")
    told: list[str] = []
    gang.at_the_end(lambda: told.append("over"))
    assert told == ["over"]


def test_a_gang_whose_watch_fails_ends() -> None:
    """Unwatched, a rank that hangs would hang the replica."""
    ours, theirs = socket.socketpair()
    gang = Gang([ours])
    with theirs:
        theirs.sendall(message_frame(Pulse(False, 0, 0.0, 1 << 60, "host", gang.machine)))  # no pid at all
        with pytest.raises(GangFailed, match="watching the ranks failed: OverflowError"):
            gang.wait(lambda: False)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_who_waits_for_a_result_or_a_collective_learns_the_cause(
    folder: Path, tp: int, pp: int, short_patience: None
) -> None:
    with gang_of(folder, tp, pp) as ready:
        assert ready.gang is not None
        os.kill(ready.pids[0], signal.SIGSTOP)
        executor = GangExecutor(ready.worker, ready.gang)
        with pytest.raises(GangFailed, match=r"rank 1 .* has been silent"):
            executor.submit(one_token_plan()).result()


def test_a_rank_in_the_middle_of_a_step_goes_when_its_connection_closes(folder: Path) -> None:
    with gang_of(folder, 1, 2) as ready:
        assert ready.gang is not None
        ready.gang.tell_all(plan_frame(one_token_plan().encode()))
        (member,) = ready.gang.members
        until(lambda: member.pulse is not None and member.pulse.age_s > 0)
        os.close(member.process)
        member.process = -1  # nobody kills it
        ready.gang.close()
        until(lambda: not is_alive(ready.pids[0]), timeout_s=2.0)


def test_a_rank_goes_when_its_parent_does() -> None:
    control, far_control = socket.socketpair()
    parent = forked(forks().control, b"f", far_control)
    sock, end = socket.socketpair()
    with control, sock:
        pid = forked(control, b"r", end)
        assert sock.recv(1), "it beats"
        os.kill(parent, signal.SIGKILL)
        until(lambda: not is_alive(pid), timeout_s=2.0)


def test_ranks_are_shown_with_their_steps(folder: Path) -> None:
    with gang_of(folder, 1, 2) as ready:
        assert ready.gang is not None
        result = GangExecutor(ready.worker, ready.gang).submit(one_token_plan()).result()
        assert len(result.ids) == 1 and result.busy_s > 0
        until(lambda: ready.gang.states()[0].step == 1)  # type: ignore[union-attr]
        (state,) = ready.gang.states()
        assert (state.rank, state.pid, state.host) == (1, ready.pids[0], socket.gethostname())
        assert state.age_s < 1.0


def test_ranks_of_one_machine_share_its_cores(folder: Path) -> None:
    with gang_of(folder, 2, 1, num_threads=None) as ready:
        assert ready.worker.found.num_threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_replica_ends_with_its_gang(folder: Path, tmp_path: Path) -> None:
    sock, pid = forks().rank()
    server = ReplicaServer(
        gang_settings(folder, 1, 2),
        replica_id="r0",
        secret=b"secret",
        listen=f"unix:{tmp_path}/s",
        exits_on_failure=False,
        ranks=[sock],
    )
    server.start()
    with Client(server.address) as client:
        assert len(client.completion(1, [3, 1, 4], max_tokens=5)) == 5
        assert [state.pid for state in server.progress()] == [os.getpid(), pid]
        client.submit(2, [1, 2], max_tokens=200)
        client.until(lambda: bool(client.tokens.get(2)))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionError):
            while True:
                client.receive()
    healthy, why = server.health()
    assert not healthy and f"rank 1 (pid {pid}" in why
    server.close()


def test_a_server_needs_a_connection_to_every_rank(folder: Path, tmp_path: Path) -> None:
    server = ReplicaServer(gang_settings(folder, 2, 2), replica_id="r0", secret=b"s", listen=f"unix:{tmp_path}/s")
    with pytest.raises(SettingsError, match="a gang of 4 ranks needs connections to 3; got 0"):
        server.start()
    server.close()


def test_a_peaceful_end_leaves_no_process(folder: Path) -> None:
    with gang_of(folder, 2, 1) as ready:
        guard = Guard(ready)
        assert all(map(is_alive, ready.pids))
    assert not any(map(is_alive, ready.pids))
    assert not guard.is_over.is_set()


def test_ranks_on_another_machine_meet_over_its_network_and_go_with_the_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine is one that calls itself so: nothing of it is killed or shared."""
    monkeypatch.setattr(gang_module, "machine", lambda: "elsewhere")
    connections = [forks().rank(over_tcp=True) for _ in range(3)]
    gang = Gang([sock for sock, _ in connections])
    worker = assemble(gang_settings(folder, 2, 2, num_threads=None), gang)
    try:
        assert [member.process for member in gang.members] == [-1, -1, -1]
        assert worker.found.num_threads == len(os.sched_getaffinity(0))
        assert len(GangExecutor(worker, gang).submit(one_token_plan()).result().ids) == 1
    finally:
        gang.close()
    until(lambda: not any(is_alive(pid) for _, pid in connections), timeout_s=2.0)


# --- coming together ------------------------------------------------------------------------------


def check_refusal(folder: Path, tp: int, pp: int, match: str) -> None:
    with pytest.raises(ModelLoadError, match=match), gang_of(folder, tp, pp):
        pass


def test_a_rank_that_cannot_load_its_share_is_named(folder: Path, tmp_path: Path) -> None:
    """The last stage alone needs the final norm."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_refusal(tmp_path, 1, 2, r"rank 1 \(pid \d+ on .+\): .*model\.norm\.weight")


def test_sizes_that_do_not_divide_are_refused_with_the_numbers(folder: Path) -> None:
    check_refusal(folder, 3, 1, "num_attention_heads 4 cannot be divided among 3 ranks")
    check_refusal(folder, 1, 4, "num_hidden_layers 3 cannot be divided among 4 stages")


def test_a_rank_that_would_compute_something_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SAMPLING_METHOD", "dice")
    check_refusal(folder, 2, 1, r"rank 1 \(.+\) differs from rank 0 in its sampling: 'splitmix64.+' instead of")


def test_a_rank_that_dies_while_loading_is_named(folder: Path) -> None:
    sock, pid = forks().rank()
    gang = Gang([sock])
    gang.wait(lambda: gang.members[0].pulse is not None)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ModelLoadError, match=rf"the gang did not come together: rank 1 \(pid {pid} on .+\) is gone"):
        assemble(gang_settings(folder, 2, 1), gang)


def test_a_rank_that_never_speaks_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_module, "SILENCE_S", 0.2)
    monkeypatch.setattr(gang_module, "LOADING_SILENCE_S", 0.2)
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(ModelLoadError, match="rank 1 has been silent for"):
        assemble(gang_settings(folder, 2, 1), Gang([ours]))


def test_who_is_no_rank_is_not_listened_to(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ModelLoadError, match="rank 1 does not speak our language"):
            assemble(gang_settings(folder, 2, 1), Gang([ours]))


def test_the_smallest_cache_of_all_ranks_is_everybodys(folder: Path) -> None:
    """Of three layers, the second stage has two."""
    with gang_of(folder, 1, 2, kv_cache_bytes=1 << 20) as ready:
        assert ready.gang is not None
        (member,) = ready.gang.members
        assert member.loaded is not None
        assert ready.worker.found.num_blocks == member.loaded.num_blocks < ready.worker.num_blocks


def test_collectives_that_cannot_work_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.assembly.is_available", lambda: False)
    with (
        pytest.raises(SettingsError, match="--collectives shared-memory: this installation was built without it"),
        gang_of(folder, 2, 1, collectives="shared-memory"),
    ):
        pass
