"""Gangs for tests: rank 0 in the test's process, every other rank in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

from serving.config import EngineSettings
from serving.engine.assembly import assemble
from serving.engine.gang import Gang
from serving.engine.worker import Worker


class Forks:
    """The process that forks ranks. Ends with this one."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(60)
        command = [sys.executable, "-m", "tests.engine.forks", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._end = weakref.finalize(self, _end, self.control, self.process)

    def rank(self, *, over_tcp: bool = False) -> tuple[socket.socket, int]:
        """A connection to a new rank, and its pid."""
        ours, theirs = tcp_pair() if over_tcp else socket.socketpair()
        return ours, forked(self.control, b"r", theirs)


def forked(control: socket.socket, what: bytes, end: socket.socket) -> int:
    """The pid of a new process that has `end`; see `tests.engine.forks`."""
    socket.send_fds(control, [what], [end.fileno()])
    end.close()
    return int.from_bytes(control.recv(4), "little")


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()
    process.wait(10)


@functools.cache
def forks() -> Forks:
    return Forks()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@dataclasses.dataclass(frozen=True)
class Ready:
    """A loaded gang."""

    worker: Worker  # rank 0's
    gang: Gang | None  # None = a single rank
    pids: tuple[int, ...]


def gang_settings(folder: Path, tp: int, pp: int, **settings: object) -> EngineSettings:
    defaults = {"max_num_seqs": 32, "max_model_len": 256, "kv_cache_bytes": 1 << 24, "num_threads": 1}
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return EngineSettings(model_dir=str(folder), served_model_name="m", **(defaults | sizes | settings))


@contextlib.contextmanager
def gang_of(folder: Path, tp: int = 1, pp: int = 1, **settings: object) -> Iterator[Ready]:
    """A gang with its model loaded; gone afterwards."""
    asked = gang_settings(folder, tp, pp, **settings)
    if tp * pp == 1:
        yield Ready(Worker(asked), None, ())
        return
    connections = [forks().rank() for _ in range(tp * pp - 1)]
    gang = Gang([sock for sock, _ in connections])
    try:
        yield Ready(assemble(asked, gang), gang, tuple(pid for _, pid in connections))
    finally:
        gang.close()
