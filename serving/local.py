"""The local runtime: replicas as forked processes, without Ray (`python -m serving.local`).

This process imports torch and the engine once and then only forks, waits and forks again: a fork
takes 9 ms where a fresh interpreter with torch takes over a second, so a killed replica is back as
soon as its weights are mapped. It stays single-threaded: nothing else is safe before a fork.

Every replica answers on a Unix socket of its own in the private run folder, under the same path
after each restart. It reports over a pipe: lines of JSON events while it starts, then one pulse
each half second for as long as its step loop is healthy. Silence is death (C13, C19b).

A replica of several ranks is as many processes. They are forked together, rank 0 with a socket to each
of the others, and whichever dies takes all of them along (C11).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from serving import logs
from serving.config import EngineSettings
from serving.control import (
    Deploy,
    Event,
    Failed,
    Loading,
    Note,
    Phase,
    Ready,
    RuntimeEnd,
    RuntimeSettings,
    encode_line,
    local_address,
)
from serving.errors import ModelLoadError, SettingsError
from serving.leash import leash

logger = logging.getLogger("argosy.local")

PULSE_S: Final = 0.5
SILENCE_S: Final = 3.0
STEADY_S: Final = 10.0  # a replica that lived this long restarts at once
MAX_BACKOFF_S: Final = 5.0
MAX_EARLY_DEATHS: Final = 3
GRACE_S: Final = 1.0  # for rank 0 to say why, when another rank has died
_PULSE: Final = b"."


@dataclasses.dataclass(slots=True)
class _Replica:
    """One slot: the processes in it change, its index and socket do not."""

    index: int
    pids: dict[int, int] = dataclasses.field(default_factory=dict)  # by rank; empty = not running
    ended: dict[int, int] = dataclasses.field(default_factory=dict)  # rank -> status, of those that we have reaped
    pidfds: dict[int, int] = dataclasses.field(default_factory=dict)  # by rank, of the others than rank 0
    grace_until_s: float | None = None  # a rank has died: rank 0 must be gone by then
    report_fd: int = -1
    report: bytes = b""
    is_ready: bool = False
    has_been_ready: bool = False
    started_s: float = 0.0
    heard_s: float = 0.0
    failures: int = 0  # deaths in a row before STEADY_S
    restart_s: float | None = 0.0  # when to fork; None = running

    @property
    def pid(self) -> int:
        return self.pids.get(0, 0)


class LocalRuntime:
    """Keeps the replicas of one model alive until the supervisor closes its end."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._supervisor = RuntimeEnd(settings.control_fd)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._supervisor.socket, selectors.EVENT_READ)
        self._secret = Path(settings.secret_file).read_bytes()
        self._replicas: list[_Replica] = []
        self._engine: EngineSettings | None = None
        self._server: Any = None
        self._run_rank: Callable[[socket.socket], NoReturn] | None = None
        self._was_ready = False
        self._looked_s = time.monotonic()

    def preload(self) -> None:
        """Import torch and the engine, so that forks have them."""
        begun = time.monotonic()
        module, name = self._settings.server.split(":")
        self._server = getattr(importlib.import_module(module), name)
        gc.collect()
        gc.freeze()  # the collector would touch, and so copy, every page shared with the forks
        self._supervisor.tell(Phase("local", "import", time.monotonic() - begun))

    def run(self) -> None:
        """Serve orders and mend replicas. Returns when told to stop, with every replica gone."""
        try:
            while True:
                for key, _ in self._selector.select(self._timeout()):
                    if key.fileobj is self._supervisor.socket:
                        orders = self._supervisor.receive()
                        if orders is None:
                            return
                        for order in orders:
                            self._deploy(order)
                    elif key.fd in key.data.pidfds.values():
                        self._note_death(key.data, key.fd)
                    elif key.fd == key.data.report_fd:
                        self._read_report(key.data)
                self._mend(time.monotonic())
        finally:
            self._stop()

    def _timeout(self) -> float:
        due = [at for r in self._replicas for at in (r.restart_s, r.grace_until_s) if at is not None]
        return max(0.0, min([PULSE_S, *(at - time.monotonic() for at in due)]))

    def _deploy(self, order: Deploy) -> None:
        self._engine = order.engine
        self._was_ready = False
        if _num_ranks(order.engine) > 1:
            self._run_rank = importlib.import_module("serving.engine.rank").run_rank
        for index in range(len(self._replicas), order.replicas):
            self._replicas.append(_Replica(index))
        for replica in self._replicas[order.replicas :]:
            self._end(replica)
        del self._replicas[order.replicas :]

    def _mend(self, now: float) -> None:
        # A runtime that itself stood still (a suspended machine) has heard nobody: that is not silence.
        if now - self._looked_s > 1.0:
            for replica in self._replicas:
                replica.heard_s = now
        self._looked_s = now
        for replica in self._replicas:
            if replica.restart_s is not None and now >= replica.restart_s:
                self._start(replica)
            elif replica.is_ready and now - replica.heard_s > SILENCE_S:
                self._tell(Note(f"replica {replica.index} (pid {replica.pid}) stands still; killed"))
                replica.is_ready = False
                os.kill(replica.pid, signal.SIGKILL)  # its end is seen as EOF of its report
            elif replica.grace_until_s is not None and now >= replica.grace_until_s:
                replica.grace_until_s = None
                os.kill(replica.pid, signal.SIGKILL)

    def _start(self, replica: _Replica) -> None:
        assert self._engine is not None
        with contextlib.suppress(FileNotFoundError):
            Path(local_address(Path(self._settings.run_dir), replica.index).removeprefix("unix:")).unlink()
        pairs = [socket.socketpair() for _ in range(_num_ranks(self._engine) - 1)]
        ends = [end for pair in pairs for end in pair]
        for rank, (_, end) in enumerate(pairs, 1):
            name = f"local-{replica.index}-rank-{rank}"
            replica.pids[rank] = pid = self._fork(name, ends, lambda end=end: self._be_rank(end), kept=[end])  # type: ignore[misc]
            replica.pidfds[rank] = os.pidfd_open(pid)
            self._selector.register(replica.pidfds[rank], selectors.EVENT_READ, replica)
        read_fd, write_fd = os.pipe()  # now, so that the other ranks do not hold it open
        to_ranks = [end for end, _ in pairs]
        replica.pids[0] = self._fork(
            f"local-{replica.index}",
            ends,
            lambda: self._be_front(replica.index, write_fd, to_ranks),
            kept=to_ranks,
        )
        os.close(write_fd)
        for end in ends:  # each belongs to one process, or its end would never be seen
            end.close()
        now = time.monotonic()
        replica.report_fd, replica.report = read_fd, b""
        replica.is_ready, replica.started_s, replica.heard_s, replica.restart_s = False, now, now, None
        self._selector.register(read_fd, selectors.EVENT_READ, replica)

    def _read_report(self, replica: _Replica) -> None:
        data = os.read(replica.report_fd, 1 << 16)
        if not data:
            self._reap(replica)
            return
        replica.heard_s = time.monotonic()
        *lines, replica.report = (replica.report + data).split(b"\n")
        for line in lines:
            if line == _PULSE:
                continue
            event = msgspec.json.decode(line, type=Event)
            if isinstance(event, Ready):
                self._note_ready(replica)
            elif isinstance(event, Failed) and replica.has_been_ready:
                self._tell(Note(f"replica {replica.index} (pid {replica.pid}): {event.text}"))  # it is tried again
            else:
                self._tell(event)

    def _note_ready(self, replica: _Replica) -> None:
        replica.is_ready = replica.has_been_ready = True
        if self._was_ready:
            took = time.monotonic() - replica.started_s
            self._tell(Note(f"replica {replica.index} is back (pid {replica.pid}, {took:.1f} s)"))
        elif all(r.is_ready for r in self._replicas):
            self._was_ready = True
            self._tell(Ready())

    def _note_death(self, replica: _Replica, pidfd: int) -> None:
        """A rank other than rank 0 is dead. Rank 0 sees it too, says why and goes; if it cannot, it is killed."""
        rank = next(rank for rank, fd in replica.pidfds.items() if fd == pidfd)
        self._forget(replica, rank)
        _, replica.ended[rank] = os.waitpid(replica.pids[rank], 0)
        replica.grace_until_s = replica.grace_until_s or time.monotonic() + GRACE_S

    def _forget(self, replica: _Replica, rank: int) -> None:
        self._selector.unregister(replica.pidfds[rank])
        os.close(replica.pidfds.pop(rank))

    def _reap(self, replica: _Replica) -> None:
        self._selector.unregister(replica.report_fd)
        os.close(replica.report_fd)
        _, replica.ended[0] = os.waitpid(replica.pid, 0)
        how, pid = self._end_ranks(replica), replica.pid
        lived = time.monotonic() - replica.started_s
        replica.failures = 0 if lived > STEADY_S and replica.is_ready else replica.failures + 1
        wait = 0.0 if replica.failures <= 1 else min(MAX_BACKOFF_S, 0.1 * 2**replica.failures)
        replica.pids, replica.ended, replica.grace_until_s = {}, {}, None
        replica.report_fd, replica.is_ready = -1, False
        replica.restart_s = time.monotonic() + wait
        self._tell(Note(f"replica {replica.index} (pid {pid}) {how}; restarting"))
        if not replica.has_been_ready and replica.failures == MAX_EARLY_DEATHS:
            hint = "; is there enough memory?" if "SIGKILL" in how else ""
            self._tell(Failed(f"replica {replica.index} {how} {MAX_EARLY_DEATHS} times while loading{hint}"))

    def _end_ranks(self, replica: _Replica) -> str:
        """No process of the gang is left. Returns how those ended that we did not kill, the first one first."""
        for rank in list(replica.pidfds):
            pid, status = os.waitpid(replica.pids[rank], os.WNOHANG)
            if pid:
                replica.ended[rank] = status
            else:
                os.kill(replica.pids[rank], signal.SIGKILL)
                os.waitpid(replica.pids[rank], 0)
            self._forget(replica, rank)
        if len(replica.pids) == 1:
            return _how(replica.ended[0])
        return ", ".join(f"rank {rank} {_how(status)}" for rank, status in replica.ended.items())

    def _end(self, replica: _Replica) -> None:
        if replica.pid:
            os.kill(replica.pid, signal.SIGKILL)
            self._selector.unregister(replica.report_fd)
            os.close(replica.report_fd)
            replica.report_fd = -1  # it may be among the events that are being looked at
            _, replica.ended[0] = os.waitpid(replica.pid, 0)
            self._end_ranks(replica)

    def _stop(self) -> None:
        for replica in self._replicas:
            self._end(replica)

    def _tell(self, event: Event) -> None:
        self._supervisor.tell(event)

    # --- in the forks ---------------------------------------------------------------------------

    def _fork(
        self, name: str, ends: Sequence[socket.socket], run: Callable[[], None], *, kept: Sequence[socket.socket]
    ) -> int:
        """The pid of a new process that executes `run` and exits. Of the sockets `ends` it keeps `kept`."""
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            leash(parent)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._settings.log_format == "json":
                logs.set_up(name, "json")
            self._supervisor.socket.close()
            self._selector.close()
            for end in ends:
                if end not in kept:
                    end.close()
            for other in self._replicas:
                for fd in (*other.pidfds.values(), other.report_fd):
                    if fd >= 0:
                        os.close(fd)
            run()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _be_rank(self, end: socket.socket) -> None:
        assert self._run_rank is not None
        self._run_rank(end)

    def _be_front(self, index: int, report_fd: int, ranks: Sequence[socket.socket]) -> None:
        """Rank 0 of a replica."""
        try:
            self._serve(index, report_fd, ranks)
        except (ModelLoadError, SettingsError, MemoryError) as error:
            os.write(report_fd, encode_line(Failed(str(error) or "out of memory while loading the model")))
            os._exit(1)

    def _serve(self, index: int, report_fd: int, ranks: Sequence[socket.socket]) -> None:
        assert self._engine is not None
        gang = {"ranks": ranks} if ranks else {}

        def report(event: Event) -> None:
            os.write(report_fd, encode_line(event))

        server = self._server(
            self._engine,
            replica_id=f"local-{index}",
            secret=self._secret,
            listen=local_address(Path(self._settings.run_dir), index),
            on_phase=lambda name, seconds: report(Phase(f"replica {index}", name, seconds)),
            on_load=lambda done, total, seconds: report(Loading(f"replica {index}", done, total, seconds)),
            **gang,
        )
        server.start()
        report(Ready())
        while True:
            healthy, why = server.health()
            if not healthy:
                logger.critical("replica %d is sick: %s", index, why)
                os._exit(1)
            os.write(report_fd, _PULSE + b"\n")
            time.sleep(PULSE_S)


def _num_ranks(engine: EngineSettings) -> int:
    return engine.tensor_parallel_size * engine.pipeline_parallel_size


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exited with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def main(argument: str) -> None:
    """argument: RuntimeSettings as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to handle
    settings = msgspec.json.decode(argument, type=RuntimeSettings)
    if settings.log_format == "json":
        logs.set_up("local", "json")  # without a thread: this process forks
    runtime = LocalRuntime(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # leaves `run` through its `finally`
    runtime.preload()
    runtime.run()


if __name__ == "__main__":
    main(sys.argv[1])
