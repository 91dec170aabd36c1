"""How waits end when a peer is gone, late or elsewhere, and what a gang leaves behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from models.parallel import TransportError
from models.transports.connect import Ranks
from tests.models.transports.processes import Pool, closed_after

KINDS = ["shared-memory", "gloo"]


def reduce_rows(ranks: Ranks, num_rows: int = 2) -> None:
    ranks.group.all_reduce(torch.ones(num_rows, 8))


def reduce_until_closed(ranks: Ranks, seconds: float) -> None:
    with closed_after(ranks, seconds):
        reduce_rows(ranks)


def receive_until_closed(ranks: Ranks, seconds: float) -> None:
    assert ranks.before is not None
    with closed_after(ranks, seconds):
        ranks.before.receive((1, 8))


def leave(ranks: Ranks) -> None:
    ranks.close()


@pytest.mark.parametrize("kind", KINDS)
def test_another_thread_ends_the_wait_for_a_killed_peer(pool: Pool, kind: str) -> None:
    gang = pool.connect(kind, tp=2)
    gang.run(reduce_rows)
    gang.ranks[1].kill()
    begun = time.monotonic()
    # gloo's own sockets may tell of the death first; memory cannot.
    with pytest.raises(TransportError, match="closed by this process" if kind == "shared-memory" else "gloo of rank 0"):
        gang.on(0, reduce_until_closed, 0.2)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("kind", KINDS)
def test_another_thread_ends_the_wait_for_a_stopped_peer(pool: Pool, kind: str) -> None:
    """As a reduction and as a link: a stopped peer closes no socket."""
    for sizes, work in [({"tp": 2}, reduce_until_closed), ({"pp": 2}, receive_until_closed)]:
        gang = pool.connect(kind, **sizes)
        # The last rank waits: in a pipeline it is the one that receives.
        os.kill(gang.ranks[0].pid, signal.SIGSTOP)
        try:
            with pytest.raises(TransportError, match="closed by this process"):
                gang.on(1, work, 0.2)
        finally:
            os.kill(gang.ranks[0].pid, signal.SIGCONT)


def test_a_peer_that_closes_ends_the_wait_at_once(pool: Pool) -> None:
    gang = pool.connect("shared-memory", tp=2)
    gang.ranks[0].start(reduce_rows, ())
    gang.on(1, leave)
    with pytest.raises(TransportError, match="shared memory of rank 0: rank 1 has left"):
        gang.ranks[0].result()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_has_a_deadline(pool: Pool, kind: str) -> None:
    gang = pool.connect(kind, tp=2, timeout_s=1.0)
    begun = time.monotonic()
    told = "rank 1 did not come within 1 s" if kind == "shared-memory" else "gloo of rank 0, stage 0"
    with pytest.raises(TransportError, match=told):
        gang.on(0, reduce_rows)
    assert 0.9 < time.monotonic() - begun < 10
    gang.ranks[1].kill()  # gloo may still be at it


def test_ranks_at_different_operations_are_told(pool: Pool) -> None:
    gang = pool.connect("shared-memory", tp=2)
    for rank, process in enumerate(gang.ranks):
        process.start(reduce_rows, (2 + rank,))
    problems = []
    for process in gang.ranks:
        with pytest.raises(TransportError) as caught:
            process.result()
        problems.append(str(caught.value))
    assert any("a reduction of 64 bytes" in problem and "a reduction of 96 bytes" in problem for problem in problems)


def test_nothing_outlives_a_killed_gang(pool: Pool) -> None:
    """The memory never had a name: not while the gang runs, nor after kill -9 of all of it."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    gang = pool.connect("shared-memory", tp=2, pp=2)
    mapped = [path for path in psutil.Process(gang.ranks[3].pid).memory_maps() if "argosy" in path.path]
    assert mapped, "the memory that all ranks share"
    during = {path.name for path in Path("/dev/shm").iterdir()}
    for rank in gang.ranks:
        rank.kill()
    after = {path.name for path in Path("/dev/shm").iterdir()}
    # Other programs may come and go there meanwhile.
    assert not [name for name in (during | after) - before if "argosy" in name or "torch" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_every_socket_is_on_loopback(pool: Pool, kind: str) -> None:
    gang = pool.connect(kind, tp=2, pp=2)
    connections = [
        connection
        for pid in [os.getpid(), *(rank.pid for rank in gang.ranks)]
        for connection in psutil.Process(pid).net_connections(kind="inet")
    ]
    assert {connection.laddr.ip for connection in connections} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    listening = [connection for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert len(listening) >= (5 if kind == "gloo" else 1)  # the store, and a gloo device per rank


def reduce_late(ranks: Ranks, pause_s: float) -> float:
    """CPU time of this process from before the pause until the reduction is done."""
    begun = time.process_time()
    time.sleep(pause_s)
    reduce_rows(ranks)
    return time.process_time() - begun


def test_a_long_wait_leaves_the_core_to_others(pool: Pool) -> None:
    """Two ranks on two cores must not starve the gateway beside them."""
    gang = pool.connect("shared-memory", tp=2)
    for process, pause_s in zip(gang.ranks, [0.0, 1.0], strict=True):
        process.start(reduce_late, (pause_s,))
    assert max(process.result() for process in gang.ranks) < 0.2
