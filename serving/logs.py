"""Log lines, for people and for machines. A leaf: every process of a service writes through it.

As JSON a line is one object in printable ASCII of at most MAX_LINE_BYTES: `ts` (UTC, milliseconds), `level`,
`process`, `logger`, `message`, and of FIELDS whatever is known. What is not in FIELDS is not written. Nothing that
a client sent can start a line, end one or drive a terminal; keys and passwords are cut out.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import json
import logging
import os
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

MAX_LINE_BYTES: Final = 16 << 10
MAX_MESSAGE_CHARS: Final = 2000
MAX_STACK_CHARS: Final = 8000
MAX_FIELD_CHARS: Final = 256
MAX_WAITING_LINES: Final = 1000
MAX_BYTES_PER_S: Final = 256 << 10
MAX_BURST_BYTES: Final = 4 << 20
CLOSE_S: Final = 1.0  # for what waits, at the end
_MAX_FRAMES: Final = 30
_MAX_NUMBER: Final = 1e18
_MAX_CAUSES: Final = 4

FIELDS: Final[Mapping[str, type]] = {
    "event": str,
    "id": str,
    "request_id": str,
    "trace_id": str,
    "endpoint": str,
    "model": str,
    "state": str,
    "status": int,
    "error_code": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "cached_tokens": int,
    "ttft_ms": float,
    "queue_ms": float,
    "prefill_ms": float,
    "decode_ms": float,
    "e2e_ms": float,
    "longest_gap_ms": float,
    "longest_gap_cause": str,
    "resumes": int,
    "preemptions": int,
    "replica": str,
    "left_out": int,
    "who": str,
    "phase": str,
    "seconds": float,
    "url": str,
    "stack": str,
}
"""All that a line may say beside its message, and as what."""

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
MARK: Final = "\x1e"
"""Begins the JSON lines of a child (RFC 7464): whatever else it or a library prints is text."""

REQUEST_ID: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("request_id", default="")
"""Of the request on whose behalf this task runs; goes into every line that it logs."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_SECRETS = re.compile(
    r"(?i)(?<=bearer )\S+|(?<=basic )[a-z0-9+/=_-]{6,}|\b(?:sk|hf)[-_][a-z0-9_-]{6,}|(?<=://)[^/\s@]+(?=@)"
)
_REMOVED: Final = "[secret]"


def printable(text: str, kept: str = "\t") -> str:
    """Without control characters but `kept`: a line must not drive its reader's terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in kept else " " for char in text)


def redacted(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Without the secrets given, and without what looks like one: API keys, Authorization, passwords in URLs."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, _REMOVED)
    return _SECRETS.sub(_REMOVED, text)


def stack_of(error: BaseException, *, has_messages: bool) -> str:
    """Frames, types and causes of an exception, the newest first.

    has_messages: whether what the exceptions say is told. In a gateway it is not: it may quote a client.
    """
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < _MAX_CAUSES:
        said = f": {seen}" if has_messages and str(seen) else ""
        if isinstance(seen, OSError) and not said and seen.strerror:
            said = f": {seen.strerror}"
        # Without source lines: looking them up reads files, and this may be an event loop.
        frames = traceback.StackSummary.extract(
            traceback.walk_tb(seen.__traceback__), limit=-_MAX_FRAMES, lookup_lines=False
        )
        where = "".join(f"\n  {frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        parts.append(f"{type(seen).__qualname__}{said}{where}")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\ncaused by ".join(parts)


def encoded(
    level: str,
    process: str,
    logger: str,
    message: str,
    fields: Mapping[str, object] | None = None,
    *,
    at: float | None = None,
    secrets: tuple[str, ...] = (),
) -> str:
    """One JSON line, without its newline. at: unix seconds, now if absent. Unknown fields are left out."""
    moment = datetime.datetime.fromtimestamp(time.time() if at is None else at, datetime.UTC)
    document: dict[str, object] = {
        "ts": moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z",
        "level": level if level in LEVELS else "info",
        "process": _short(process),
        "logger": _short(logger),
        "message": _cut(_clean(message, secrets), MAX_MESSAGE_CHARS),
    }
    for name, value in (fields or {}).items():
        kind = FIELDS.get(name)
        if kind is str and isinstance(value, str) and value:
            if name == "stack":
                document[name] = _cut(_clean(value, secrets), MAX_STACK_CHARS)
            else:
                document[name] = redacted(_short(value), secrets)
        elif kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
            # neither infinite nor NaN: JSON has no word for them
            document |= {name: value} if abs(value) < _MAX_NUMBER else {}
    line = json.dumps(document, ensure_ascii=True, allow_nan=False)
    while len(line) > MAX_LINE_BYTES:  # escapes take up to twelve bytes each
        longest = max(("message", "stack"), key=lambda name: len(str(document.get(name, ""))))
        text = str(document[longest])
        document[longest] = _cut(text, len(text) // 2)
        line = json.dumps(document, ensure_ascii=True, allow_nan=False)
    return line


def checked(line: str, process: str) -> str | None:
    """A line that a child wrote through a JsonFormatter, encoded anew: only FIELDS, bounded, and in the name of
    `process` or a part of it. None when it is something else."""
    if not line.startswith(MARK):
        return None
    try:
        document = json.loads(line[len(MARK) :])
        texts = [str(document[name]) for name in ("level", "process", "logger", "message")]
        at = datetime.datetime.fromisoformat(document["ts"]).timestamp()
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    level, part, logger, message = texts
    is_part = part.startswith(f"{process}-")
    return encoded(level, part if is_part else process, logger, message, document, at=at)


def _clean(text: str, secrets: tuple[str, ...] = ()) -> str:
    return redacted(printable(_ANSI.sub("", text[: 4 * MAX_STACK_CHARS]), "\n\t"), secrets)


def _short(text: str) -> str:
    return printable(_ANSI.sub("", text[: 2 * MAX_FIELD_CHARS]), "")[:MAX_FIELD_CHARS]


def _cut(text: str, limit: int) -> str:
    """At most `limit` characters, its beginning and its end."""
    if len(text) <= limit:
        return text
    half = max(limit // 2 - 10, 0)
    return f"{text[:half]} [{len(text) - 2 * half} left out] {text[len(text) - half :]}"


class TextFormatter(logging.Formatter):
    """For people; with stacks as `stack_of` tells them."""

    def __init__(self, *, has_messages: bool = True, secrets: tuple[str, ...] = ()) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self._has_messages = has_messages
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + stack_of(record.exc_info[1], has_messages=self._has_messages)
        return _clean(text, self._secrets)


class JsonFormatter(logging.Formatter):
    """For machines. A record's `fields` (given as `extra`) go into its line, as far as FIELDS knows them."""

    def __init__(
        self, process: str, *, has_messages: bool = True, secrets: tuple[str, ...] = (), mark: str = MARK
    ) -> None:
        super().__init__()
        self._process = process
        self._has_messages = has_messages
        self._secrets = secrets
        self._mark = mark

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", None) or {})
        fields.setdefault("request_id", REQUEST_ID.get())
        if record.exc_info and record.exc_info[1] is not None:
            fields["stack"] = stack_of(record.exc_info[1], has_messages=self._has_messages)
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit their text: a library's mistake
            message = str(record.msg)
        return self._mark + encoded(
            record.levelname.lower(),
            self._process,
            record.name,
            message,
            fields,
            at=record.created,
            secrets=self._secrets,
        )


class Allowance:
    """`rate` per second, and `burst` at once after a rest. Whoever floods us must not fill a disk."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = float(burst)
        self._at = 0.0

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Whether so much more may be written. now: monotonic seconds."""
        self._left = min(self._left + self._rate * max(now - self._at, 0.0), self._burst)
        self._at = now
        if self._left < cost:
            return False
        self._left -= cost
        return True


class Outlet(logging.Handler):
    """Writes lines to a file descriptor, MAX_BYTES_PER_S in the long run: what is beyond is counted and dropped.

    is_patient: each line at once, however long that takes. Else a thread writes them, and beyond
    MAX_WAITING_LINES they are counted and dropped: whoever logs never waits for a reader. Lines that end the
    process (critical) are waited for, for CLOSE_S at most.
    """

    def __init__(self, fd: int, *, is_patient: bool) -> None:
        super().__init__()
        self.num_dropped = 0
        self._fd = fd
        self._allowance = Allowance(MAX_BYTES_PER_S, MAX_BURST_BYTES)
        self._told = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING_LINES)
        self._writer: threading.Thread | None = None
        if not is_patient:
            self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
            self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        except Exception:  # a log must never break what it tells of
            self.num_dropped += 1
            return
        if record.levelno < logging.CRITICAL and not self._allowance.take(time.monotonic(), len(line)):
            self.num_dropped += 1
            return
        if self._writer is None:
            self._write_one(line)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.num_dropped += 1
        if record.levelno >= logging.CRITICAL:
            self.flush()

    def flush(self) -> None:
        """What waits is written, unless nobody reads for CLOSE_S."""
        give_up_at = time.monotonic() + CLOSE_S
        while self._writer is not None and self._lines.unfinished_tasks and time.monotonic() < give_up_at:
            time.sleep(0.005)

    def close(self) -> None:
        self.flush()
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write_one(line)
            self._lines.task_done()

    def _write_one(self, line: bytes) -> None:
        if self.num_dropped > self._told:
            number, self._told = self.num_dropped - self._told, self.num_dropped
            record = logging.LogRecord("argosy.logs", logging.WARNING, "", 0, "%d lines dropped", (number,), None)
            record.fields = {"event": "lines_dropped", "left_out": number}
            self._write((self.format(record) + "\n").encode())
        self._write(line)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more
            while data:
                data = data[os.write(self._fd, data) :]


def set_up(
    process: str,
    log_format: str,
    *,
    is_patient: bool = True,
    has_messages: bool = True,
    secrets: tuple[str, ...] = (),
    level: int = logging.INFO,
) -> Outlet:
    """Make this process's loggers, warnings and uncaught exceptions lines on standard error; in place of an earlier
    set-up. log_format: json | text. The rest: see Outlet, stack_of, redacted."""
    formatter: logging.Formatter
    if log_format == "json":
        formatter = JsonFormatter(process, has_messages=has_messages, secrets=secrets)
    else:
        formatter = TextFormatter(has_messages=has_messages, secrets=secrets)
    outlet = Outlet(2, is_patient=is_patient)
    outlet.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(outlet)
    root.setLevel(level)
    logging.captureWarnings(True)
    logger = logging.getLogger("argosy.process")

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt | SystemExit):
            logger.critical("ended by an exception", exc_info=error)

    def uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
            name = arguments.thread.name if arguments.thread is not None else "?"
            logger.error("thread %s ended by an exception", name, exc_info=arguments.exc_value)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    return outlet


def on_loop_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler. asyncio's own prints tasks, and with them what their exceptions say."""
    logging.getLogger("argosy.process").error("%s", context.get("message"), exc_info=context.get("exception"))
