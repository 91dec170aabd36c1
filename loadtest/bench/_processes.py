"""Processes of a benchmark: leashed to it, pinned to cores, their CPU time read exactly."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

Answer = TypeVar("Answer")

STOP_S = 5.0
_SCHEDULER_CLOCK = 2  # CPUCLOCK_SCHED of the kernel: what clock_getcpuclockid(3) computes


class ProcessFailed(Exception):
    """A process of the benchmark ended or stayed silent; the text has its last words."""


def cpu_s(pid: int) -> float:
    """User and system seconds that all threads of a process have used, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)


def two_sides() -> tuple[set[int], set[int]]:
    """(the core of what is measured, the cores of everything else): the same core when there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:]) or {cores[0]}


def allow_files(count: int) -> None:
    """Raise this process's limit of open files, and with it its children's. Raises ProcessFailed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ProcessFailed(f"needs {count} open files, the limit is {hard}: raise it with `ulimit -Hn`")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class Process:
    """`python -m module`, which finds its settings as JSON in sys.argv[1] and answers in lines of JSON."""

    def __init__(self, module: str, settings: Any, *, cores: set[int], fds: tuple[int, ...] = ()) -> None:
        self.name = module.rpartition(".")[2]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest = b""
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "serving.leash", str(os.getpid()), str(int(signal.SIGKILL)), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=fds,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        os.sched_setaffinity(self.pid, cores)  # before it has a second thread: all will inherit it
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(msgspec.json.encode(settings))
            self._popen.stdin.close()

    def answer(self, kind: type[Answer], timeout_s: float) -> Answer:
        """Its next line. Raises ProcessFailed when it ends or says nothing in time."""
        stdout = self._popen.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    raise ProcessFailed(f"{self.name}: no answer within {timeout_s:g} s; {self.last_words()}")
                data = os.read(stdout.fileno(), 1 << 20)
                if not data:
                    self._popen.wait(STOP_S)
                    raise ProcessFailed(f"{self.name}: exited with {self._popen.returncode}; {self.last_words()}")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return msgspec.json.decode(line, type=kind)

    def check(self) -> None:
        """Raises ProcessFailed when it has ended."""
        if self._popen.poll() is not None:
            raise ProcessFailed(f"{self.name}: exited with {self._popen.returncode}; {self.last_words()}")

    def last_words(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()[-2000:].decode(errors="replace").strip() or "it said nothing"

    def ask_to_end(self) -> None:
        """SIGTERM; what it answers can still be read."""
        if self._popen.poll() is None:
            self._popen.terminate()

    def end(self) -> None:
        """Ask, wait, kill. Idempotent."""
        self.ask_to_end()
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        self._stderr.close()


@contextlib.contextmanager
def running(module: str, settings: Any, *, cores: set[int], fds: tuple[int, ...] = ()) -> Iterator[Process]:
    """The process, for the length of the block."""
    process = Process(module, settings, cores=cores, fds=fds)
    try:
        yield process
    finally:
        process.end()
