"""What `argosy serve --log-format json` writes: every line of every process as one JSON object on standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import threading
import time
from typing import Any, Final

from serving import logs

MAX_WAITING_LINES: Final = 4000
QUIET_S: Final = 0.1  # lines of one process that belong together come closer than this
MAX_JOINED_CHARS: Final = 32 << 10
_LOADING_S: Final = 10.0  # between two lines about one replica's weights
_CLOSE_S: Final = 1.0

_TRACE = re.compile(
    r"(Traceback|Stack|Thread 0x\w+|Current thread 0x\w+).*\(most recent call (last|first)\)|Fatal Python error"
)
_CHAIN = re.compile(r"During handling of the above|The above exception was|Extension modules: ")


@dataclasses.dataclass(slots=True)
class _Text:
    """Lines that a process printed one after the other and that tell one thing."""

    at: float  # unix seconds
    lines: list[str]
    touched: float  # monotonic
    is_trace: bool = False
    lacks_end: bool = False  # a traceback's last line, what was raised, is still to come
    num_chars: int = 0


class Printed:
    """Joins what processes print without our formatter: a stack is one line of the log, whoever printed it."""

    def __init__(self) -> None:
        self._open: dict[str, _Text] = {}

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    def add(self, source: str, line: str, at: float, now: float) -> list[str]:
        """One printed line; returns the JSON lines that are complete by it. at: unix seconds, now: monotonic."""
        text = self._open.get(source)
        is_head = bool(_TRACE.search(line))
        if text is not None and self._continues(text, line, is_head):
            text.touched = now
            text.num_chars += len(line)
            if text.num_chars < MAX_JOINED_CHARS:
                text.lines.append(line)
        else:
            done = self.end(source)
            if line.strip():
                self._open[source] = text = _Text(at, [line], now)
            if text is None or not line.strip():
                return done
            if is_head:
                self._begin_trace(text, line)
            return done
        if is_head:
            self._begin_trace(text, line)
        elif text.lacks_end and line.strip() and not line[0].isspace():
            text.lacks_end = False
        return []

    @staticmethod
    def _begin_trace(text: _Text, line: str) -> None:
        text.is_trace = True
        text.lacks_end = "most recent call last" in line

    @staticmethod
    def _continues(text: _Text, line: str, is_head: bool) -> bool:
        if not line.strip() or line[0].isspace():
            return True
        return text.is_trace and (text.lacks_end or is_head or bool(_CHAIN.match(line)))

    def end(self, source: str) -> list[str]:
        """What a process has said is complete, for something else follows."""
        text = self._open.pop(source, None)
        if text is None:
            return []
        lines = [line.rstrip() for line in text.lines]
        while lines and not lines[-1]:
            lines.pop()
        if not text.is_trace:
            return [logs.encoded("info", source, "output", "\n".join(lines), at=text.at)]
        said = next((line for line in reversed(lines) if line and not line[0].isspace()), lines[0])
        fields = {"stack": "\n".join(lines)}
        return [logs.encoded("error", source, "output", said, fields, at=text.at)]

    def end_quiet(self, now: float, quiet_s: float = QUIET_S) -> list[str]:
        """What is complete because nothing has followed for a while."""
        quiet = [source for source, text in self._open.items() if now - text.touched >= quiet_s]
        return [line for source in quiet for line in self.end(source)]


class JsonLines:
    """The supervisor's view for machines.

    Standard output and error of this process become a pipe of ours until `close`, so that whatever a library prints
    is a JSON line as well. A thread writes; beyond MAX_WAITING_LINES lines are dropped and counted: a reader that
    stands still must not stop the process that restarts dead children.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._loading: dict[str, float] = {}
        self._dropped = 0
        self._printed = Printed()
        self._lines: queue.Queue[tuple[str, str, float] | None] = queue.Queue(MAX_WAITING_LINES)
        self._saved = (os.dup(1), os.dup(2))
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._writer.start()
        read_fd, write_fd = os.pipe()
        os.dup2(write_fd, 1)
        os.dup2(write_fd, 2)
        os.close(write_fd)
        self._reader = threading.Thread(target=self._read_own, args=(read_fd,), name="own output", daemon=True)
        self._reader.start()
        logs.set_up("supervisor", "json")

    # --- what the supervisor tells ----------------------------------------------------------------

    def phase(self, who: str, name: str, seconds: float) -> None:
        """A part of a cold start is over."""
        fields = {"event": "phase", "who": who, "phase": name, "seconds": round(seconds, 3)}
        self._say("info", f"{who}: {name} {seconds:.2f} s", fields)

    def loading(self, who: str, done_bytes: int, total_bytes: int, seconds: float) -> None:
        """How far the weights are; told every few seconds."""
        if seconds - self._loading.get(who, 0.0) >= _LOADING_S:
            self._loading[who] = seconds
            self._say("info", f"{who}: {done_bytes:,} of {total_bytes:,} bytes of weights", {"who": who})

    def pulling(self, phase: str, done: int, total: int) -> None:
        """Progress of bringing the model into the store is for terminals."""

    def log(self, source: str, line: str, level: str = "info") -> None:
        """One line of a child's output, or of the supervisor's own."""
        if source == "supervisor":
            self._say(level, line)
        else:
            self._put(source, line)

    def ready(self, url: str, seconds: float) -> None:
        """A completion would be served now."""
        self._loading.clear()
        fields = {"event": "ready", "url": f"{url}/v1", "model": self._model, "seconds": round(seconds, 3)}
        self._say("info", f"ready after {seconds:.1f} s", fields)

    def stopping(self) -> None:
        """The first Ctrl-C or SIGTERM arrived."""
        self._say("info", "stopping", {"event": "stopping"})

    def failed(self, text: str) -> None:
        """Why it cannot serve, and what to do."""
        self._say("error", text, {"event": "failed"})

    def close(self) -> None:
        """Write what waits; standard output and error are what they were."""
        for fd, saved in enumerate(self._saved, 1):
            os.dup2(saved, fd)
        self._reader.join(_CLOSE_S)
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_S)
        self._writer.join(_CLOSE_S)

    # --- lines ------------------------------------------------------------------------------------

    def _say(self, level: str, message: str, fields: dict[str, Any] | None = None) -> None:
        self._put("supervisor", logs.MARK + logs.encoded(level, "supervisor", "argosy.supervisor", message, fields))

    def _put(self, source: str, line: str) -> None:
        try:
            self._lines.put_nowait((source, line, time.time()))
        except queue.Full:
            self._dropped += 1

    def _read_own(self, fd: int) -> None:
        with open(fd, encoding="utf-8", errors="replace") as stream:  # lines end at \n, \r and \r\n
            while line := stream.readline(logs.MAX_LINE_BYTES + 2):
                self._put("supervisor", line.rstrip("\n"))

    def _write_all(self) -> None:
        while True:
            try:
                item = self._lines.get(timeout=QUIET_S if self._printed.is_open else None)
            except queue.Empty:
                self._write(self._printed.end_quiet(time.monotonic()))
                continue
            if item is None:
                break
            if self._dropped:
                number, self._dropped = self._dropped, 0
                fields = {"event": "lines_dropped", "left_out": number}
                self._write([logs.encoded("warning", "supervisor", "argosy.logs", f"{number} lines dropped", fields)])
            source, line, at = item
            now = time.monotonic()
            self._write(self._printed.end_quiet(now))
            ours = logs.checked(line, source)
            if ours is None:
                self._write(self._printed.add(source, line.removeprefix(logs.MARK), at, now))
            else:
                self._write([*self._printed.end(source), ours])
        self._write(self._printed.end_quiet(time.monotonic(), 0.0))

    def _write(self, lines: list[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode("ascii")
        with contextlib.suppress(OSError):  # nobody reads any more; serving goes on
            while data:
                data = data[os.write(self._saved[1], data) :]
