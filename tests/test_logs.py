"""Log lines: whatever goes in, one bounded line of printable ASCII comes out, and it tells no secret."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

from serving import logs
from serving.logs import (
    FIELDS,
    MARK,
    MAX_BURST_BYTES,
    MAX_BYTES_PER_S,
    MAX_LINE_BYTES,
    JsonFormatter,
    Outlet,
    TextFormatter,
    encoded,
    redacted,
    stack_of,
)

CANARY = "canary-of-a-prompt"
PIECES = (
    "\r\n",
    "\n",
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u2028",
    "\u202e",
    "\ud800",
    "\0",
    '"',
    "\\",
    "é",
    "😀",
    "a",
)


def hostile(draw: random.Random, length: int) -> str:
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(length)))


def test_any_text_becomes_one_line_of_printable_ascii_that_parses() -> None:
    draw = random.Random(1)
    for length in [3] * 200 + [40] * 100 + [30_000] * 6:
        texts = [hostile(draw, length) for _ in range(6)]
        fields: dict[str, Any] = {"model": texts[0], "stack": texts[1], "request_id": texts[2], "event": "request"}
        line = encoded(texts[3], texts[4], "logger", texts[5], fields)
        assert re.fullmatch(r"[ -~]+", line) and len(line) <= MAX_LINE_BYTES
        document = json.loads(line)
        assert {"ts", "level", "process", "logger", "message"} <= document.keys()
        assert document["level"] in logs.LEVELS
        for name, value in document.items():
            assert not isinstance(value, str) or re.fullmatch(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f]*", value), name
        assert not re.search(r"[\r\n\t]", document.get("model", "") + document.get("request_id", ""))


def test_only_known_fields_of_the_right_kind_are_written() -> None:
    given = {
        "prompt": CANARY,
        "authorization": "x",
        "status": "200",
        "model": 7,
        "ttft_ms": float("nan"),
        "resumes": True,
    }
    document = json.loads(encoded("info", "p", "l", "m", given | {"status": 200, "e2e_ms": 1.5, "left_out": 1 << 70}))
    assert document.keys() == {"ts", "level", "process", "logger", "message", "status", "e2e_ms"}
    assert not {"prompt", "text", "content", "authorization", "headers", "tokens"} & FIELDS.keys()


def test_the_time_is_utc_with_milliseconds() -> None:
    assert json.loads(encoded("info", "p", "l", "m", at=1_700_000_000.0426))["ts"] == "2023-11-14T22:13:20.042Z"


def test_what_looks_like_a_secret_is_cut_out() -> None:
    for text, kept in (
        ("Authorization: Bearer abc.DEF-123== and on", "and on"),
        ("authorization: basic dXNlcjpwYXNz", "authorization"),
        ("key sk-proj_abcdef123456 failed", "failed"),
        ("hf_abcdefghijk is no token", "is no token"),
        ("cannot reach https://user:hunter22@host:4318/x", "host:4318/x"),
        ("the secret is 00ff00ff00ff", "the secret is"),
    ):
        told = redacted(text, ("00ff00ff00ff", ""))
        assert kept in told and "[secret]" in told
        for secret in ("abc.DEF", "dXNl", "abcdef123", "abcdefghijk", "hunter22", "00ff"):
            assert secret not in told
    assert (
        redacted("a task-force of risk-takers asks https://host/a@b")
        == "a task-force of risk-takers asks https://host/a@b"
    )


def failure() -> BaseException:
    try:
        try:
            raise KeyError(CANARY)
        except KeyError:
            raise ValueError(f"bad prompt {CANARY}") from None
    except ValueError as error:
        try:
            raise OSError(28, "No space left on device", CANARY) from error
        except OSError as last:
            return last


def test_a_stack_tells_where_and_what_kind_but_no_message_unless_asked() -> None:
    told = stack_of(failure(), has_messages=False)
    assert "OSError: No space left on device" in told and "caused by ValueError" in told and "test_logs.py" in told
    assert CANARY not in told and "KeyError" not in told
    assert CANARY in stack_of(failure(), has_messages=True)


def test_both_formatters_hide_messages_of_exceptions_in_a_gateway() -> None:
    error = failure()
    record = logging.LogRecord("argosy.gateway", 40, "", 0, "on %s", ("x\r\n\x1b[31my",), (type(error), error, None))
    text = TextFormatter(has_messages=False).format(record)
    line = JsonFormatter("gateway-0", has_messages=False).format(record)
    assert CANARY not in text + line and "ERROR argosy.gateway: on x  y" in text.replace("\n", " ")
    document = json.loads(line.removeprefix(MARK))
    assert document["message"] == "on x \ny" and "OSError" in document["stack"] and document["level"] == "error"


def test_a_line_carries_the_id_of_the_request_on_whose_behalf_it_is_written() -> None:
    record = logging.LogRecord("l", 20, "", 0, "m", (), None)
    formatter = JsonFormatter("p", mark="")
    token = logs.REQUEST_ID.set("req-7")
    try:
        assert json.loads(formatter.format(record))["request_id"] == "req-7"
    finally:
        logs.REQUEST_ID.reset(token)
    assert "request_id" not in json.loads(formatter.format(record))


def test_a_child_speaks_only_for_itself() -> None:
    line = MARK + encoded("info", "supervisor", "l", "m", {"event": "e"})
    assert json.loads(logs.checked(line, "gateway-0") or "")["process"] == "gateway-0"
    line = MARK + encoded("info", "local-1", "l", "m", at=1_700_000_000.123)
    document = json.loads(logs.checked(line, "local") or "")
    assert (document["process"], document["ts"]) == ("local-1", "2023-11-14T22:13:20.123Z")
    forged = MARK + json.dumps(
        {"ts": "2023-11-14T22:13:20Z", "level": "x", "process": "p", "logger": "l", "message": "m\n", "prompt": 1}
    )
    assert json.loads(logs.checked(forged, "p") or "") == {
        "ts": "2023-11-14T22:13:20.000Z", "level": "info", "process": "p", "logger": "l", "message": "m\n",
    }  # fmt: skip
    for other in ("plain", MARK + "{", MARK + "[]", MARK + '{"ts": 1}', line.removeprefix(MARK)):
        assert logs.checked(other, "p") is None


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_full_pipe_costs_lines_and_no_time(log_format: str) -> None:
    read_fd, write_fd = os.pipe()
    outlet = Outlet(write_fd, is_patient=False)
    outlet.setFormatter(JsonFormatter("p", mark="") if log_format == "json" else TextFormatter())
    logger = logging.Logger("full")
    logger.addHandler(outlet)
    begun = time.monotonic()
    slowest = 0.0
    for number in range(5000):
        at = time.monotonic()
        logger.warning("line %d %s", number, "x" * 100)
        slowest = max(slowest, time.monotonic() - at)
    assert time.monotonic() - begun < 3.0 and slowest < 0.5, "nobody reads"
    assert outlet.num_dropped > 2000
    os.set_blocking(read_fd, False)
    got = b""

    def read_until(is_done: Callable[[], bool]) -> None:
        nonlocal got
        deadline = time.monotonic() + 5.0
        while not is_done():
            assert time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                got += os.read(read_fd, 1 << 20)

    read_until(lambda: outlet._lines.unfinished_tasks == 0)
    logger.warning("the last")
    read_until(lambda: b"the last" in got)
    lines = got.decode().splitlines()
    dropped = sum(int(match.group(1)) for line in lines if (match := re.search(r"(\d+) lines dropped", line)))
    assert dropped == outlet.num_dropped
    assert sum("line " in line for line in lines) == 5000 - dropped
    outlet.close()
    os.close(read_fd)
    os.close(write_fd)


def test_a_flood_fills_no_disk_and_its_end_is_told() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    outlet = Outlet(write_fd, is_patient=True)
    outlet.setFormatter(JsonFormatter("p", mark=""))
    written: list[bytes] = []
    outlet._write = written.append  # type: ignore[method-assign]
    logger = logging.Logger("flood")
    logger.addHandler(outlet)
    begun = time.monotonic()
    for _ in range(6000):
        logger.error("x" * 1500)
    took = time.monotonic() - begun
    assert sum(map(len, written)) <= MAX_BURST_BYTES + MAX_BYTES_PER_S * (took + 0.1) + 200 * len(written)
    num_told = sum(b"xxx" in line for line in written)
    assert 2000 < num_told < 4500 and outlet.num_dropped == 6000 - num_told
    logger.critical("the end is always told")
    assert b"always told" in written[-1]
    counts = [re.search(rb"(\d+) lines dropped", line) for line in written]
    assert sum(int(count.group(1)) for count in counts if count) == outlet.num_dropped
    os.close(write_fd)


def test_a_process_set_up_turns_every_end_into_a_line() -> None:
    program = textwrap.dedent("""
        import threading, warnings
        from serving import logs
        logs.set_up("gateway-0", "json", is_patient=False, has_messages=False, secrets=("00ff00ff",))
        warnings.warn("a warning of 00ff00ff")
        thread = threading.Thread(target=lambda: 1 / 0, name="t")
        thread.start()
        thread.join()
        raise ValueError("canary-of-a-prompt")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    documents = [json.loads(line.removeprefix(MARK)) for line in done.stderr.strip("\n").split("\n")]
    assert [(d["level"], d["logger"]) for d in documents] == [
        ("warning", "py.warnings"),
        ("error", "argosy.process"),
        ("critical", "argosy.process"),
    ]
    assert "ZeroDivisionError" in documents[1]["stack"] and "ValueError" in documents[2]["stack"]
    assert CANARY not in done.stderr and "00ff00ff" not in done.stderr
