"""What `--log-format json` makes of everything that processes print."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import traceback
from typing import Any

from serving.json_lines import QUIET_S, Printed
from serving.logs import MARK


def told(lines: list[str], quiet_after: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """The log of one process that prints these lines, with a pause after some of them (by index)."""
    printed, now, found = Printed(), 0.0, []
    for at, line in enumerate(lines):
        found += printed.end_quiet(now)
        found += printed.add("local", line, 1_700_000_000 + now, now)
        now += 2 * QUIET_S if at in quiet_after else QUIET_S / 100
    found += printed.end_quiet(now, 0.0)
    assert not printed.is_open
    return [json.loads(line) for line in found]


def test_every_printed_line_is_told_once_and_in_order() -> None:
    found = told(["one", "", "two", "  more of two", "three"], quiet_after=(0,))
    assert [document["message"] for document in found] == ["one", "two\n  more of two", "three"]
    assert {(document["process"], document["level"], document["logger"]) for document in found} == {
        ("local", "info", "output")
    }


def test_a_python_traceback_with_causes_is_one_line() -> None:
    try:
        try:
            json.loads("{")
        except ValueError as error:
            raise RuntimeError("the last word") from error
    except RuntimeError:
        text = traceback.format_exc()
    before, trace, after = told(["before", *text.splitlines(), "after"])
    assert (before["message"], after["message"]) == ("before", "after")
    assert trace["level"] == "error" and trace["message"] == "RuntimeError: the last word"
    assert trace["stack"] == text.rstrip()


def test_the_last_words_of_a_crashed_interpreter_are_one_line() -> None:
    program = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    before, *dump = told(["before", *died.stderr.splitlines()])
    assert before["message"] == "before"
    assert len(dump) == 1 and dump[0]["level"] == "error" and "Segmentation fault" in dump[0]["stack"]
    assert "string_at" in dump[0]["stack"]


def test_processes_do_not_mix() -> None:
    printed = Printed()
    printed.add("a", "Traceback (most recent call last):", 0.0, 0.0)
    printed.add("b", "hello", 0.0, 0.0)
    printed.add("a", "  File x", 0.0, 0.0)
    printed.add("a", "ValueError: no", 0.0, 0.0)
    found = {(line := json.loads(text))["process"]: line for text in printed.end_quiet(1.0)}
    assert found["b"]["message"] == "hello" and found["a"]["message"] == "ValueError: no"
    assert found["a"]["stack"].count("\n") == 2


def test_endless_output_of_one_kind_stays_bounded() -> None:
    found = told(["head", *["  indented" * 100] * 1000])
    assert len(found) == 1 and len(json.dumps(found[0])) < 20_000


def test_everything_that_the_process_prints_is_json_and_its_own_streams_come_back() -> None:
    program = textwrap.dedent(r"""
        import os, subprocess, sys, threading, warnings
        from serving.json_lines import JsonLines
        view = JsonLines("a model")
        print("to standard output")
        print("\x1b[31mred\x1b[0m\rprogress\r", file=sys.stderr, flush=True)
        os.write(2, b"raw \xff bytes\n")
        sys.stdout.flush()
        subprocess.run(["echo", "of another program"])
        warnings.warn("careful")
        threading.Thread(target=lambda: 1 / 0, name="t").start()
        view.log("gateway-0", "a child's line")
        view.log("gateway-0", "\x1e{broken")
        view.log("supervisor", "the gateway died", "warning")
        view.phase("replica 0", "weights", 0.25)
        view.ready("http://127.0.0.1:8000", 1.5)
        view.failed("no\nway")
        os.write(1, b"no newline at the end")
        view.close()
        sys.stderr.write("plain again\n")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    *lines, last = done.stderr.splitlines()
    assert last == "plain again" and done.stdout == ""
    documents = [json.loads(line) for line in lines]
    found = {document["message"]: document for document in documents}
    for message in ("to standard output", "red", "progress", "raw � bytes", "of another program", "a child's line"):
        assert found[message]["level"] == "info", message
    assert found["{broken"]["process"] == "gateway-0"
    assert found["no newline at the end"]["process"] == "supervisor"
    assert found["the gateway died"]["level"] == "warning" and found["no\nway"]["event"] == "failed"
    assert found["replica 0: weights 0.25 s"]["seconds"] == 0.25
    assert found["ready after 1.5 s"]["url"] == "http://127.0.0.1:8000/v1"
    assert any("careful" in message for message in found)
    assert any("ZeroDivisionError" in document.get("stack", "") for document in documents)
    assert MARK not in done.stderr


def test_a_reader_that_stands_still_does_not_stop_the_supervisor() -> None:
    program = textwrap.dedent("""
        import time
        from serving.json_lines import JsonLines
        view = JsonLines("m")
        begun = time.monotonic()
        for number in range(20_000):
            view.log("local", f"line {number} " + "x" * 200)
        took = time.monotonic() - begun
        begun = time.monotonic()
        view.close()
        with open("/proc/self/fd/1", "w") as out:
            print(took, time.monotonic() - begun, file=out, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    took, closing = map(float, process.stdout.readline().split())  # nobody has read standard error yet
    assert took < 5.0 and closing < 5.0
    process.kill()
    process.communicate()
