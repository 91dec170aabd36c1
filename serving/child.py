"""One process that the supervisor keeps alive."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

from serving import config, logs

STEADY_S: Final = 10.0  # a child that lived this long restarts at once
MAX_BACKOFF_S: Final = 5.0
MAX_LOG_LINE_BYTES: Final = logs.MAX_LINE_BYTES + 1  # with its mark

Log = Callable[[str, str], None]
"""(name of the process, one line of its output)"""


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """What one start of a child needs."""

    argument: str  # what the module finds in sys.argv[1]; travels through standard input
    fds: tuple[int, ...] = ()  # inherited under the same numbers
    given: socket.socket | None = None  # inherited as well, and closed here once the child has it


class Child:
    """Runs `python -m module` on a leash (serving/leash.py) and restarts it when it dies.

    Its output arrives line by line at `log`. on_exit(exit code, deaths in a row) is called after
    each exit, and with it the restart waits: not at all after a steady life, else up to 5 s.
    orphan_signal is what the kernel sends it when the supervisor is gone.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *,
        log: Log,
        on_exit: Callable[[int, int], None] | None = None,
        orphan_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.pid = 0  # 0 = not running
        self.starts = 0
        self._module = module
        self._log = log
        self._on_exit = on_exit
        self._orphan_signal = orphan_signal
        self._failures = 0
        self._is_stopping = False

    async def keep(self, prepare: Callable[[], Launch]) -> None:
        """Start it, and start it again whenever it exits, until `stop` is called."""
        while True:
            begun = time.monotonic()
            code = await self._run(prepare())
            if self._is_stopping:
                return
            self._failures = 0 if time.monotonic() - begun > STEADY_S else self._failures + 1
            if self._on_exit is not None:
                self._on_exit(code, self._failures)
            if self._failures > 1:
                await asyncio.sleep(min(MAX_BACKOFF_S, 0.1 * 2**self._failures))

    async def _run(self, launch: Launch) -> int:
        given = () if launch.given is None else (launch.given.fileno(),)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "serving.leash",
                str(os.getpid()),
                str(int(self._orphan_signal)),
                self._module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(*launch.fds, *given),
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
                env=config.child_environment({"PYTHONUNBUFFERED": "1"}),
            )
        finally:
            if launch.given is not None:
                launch.given.close()
        self.pid = process.pid
        self.starts += 1
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(launch.argument.encode())
            await process.stdin.drain()
        process.stdin.close()
        pump = asyncio.create_task(self._pump(process.stdout))
        try:
            return await process.wait()
        finally:
            _kill_group(process.pid)  # what it started and left: Ray's agents outlive their raylet
            self.pid = 0
            # What it started may still hold the pipe: say what is there and go on.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pump, 0.5)

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._log(self.name, line[:MAX_LOG_LINE_BYTES].decode(errors="replace"))
            rest = rest[:MAX_LOG_LINE_BYTES]
        if rest:
            self._log(self.name, rest.decode(errors="replace"))

    def stop(self, *, ask: bool = True) -> None:
        """Do not start it again, and ask it to end (SIGTERM) unless it learns that in another way."""
        self._is_stopping = True
        if ask and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything in its process group at once."""
        self._is_stopping = True
        if self.pid:
            _kill_group(self.pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
