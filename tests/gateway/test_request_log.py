"""The line that is written when a request's life ends."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serving.errors import EngineError
from serving.gateway.request_log import SUMMARY_S, RequestLog, fields_of
from serving.logs import FIELDS, REQUEST_ID, JsonFormatter, TextFormatter
from tests.gateway.lives import a_life, failed, refused
from tests.gateway.world import Script, a_world, until

CANARY = "canary-of-a-prompt"
KEY = "sk-canary-of-a-key"


class Written(logging.Handler):
    """What a gateway process would write."""

    def __init__(self, log_format: str = "json") -> None:
        super().__init__()
        json_formatter = JsonFormatter("gateway-0", has_messages=False, mark="")
        self.setFormatter(json_formatter if log_format == "json" else TextFormatter(has_messages=False))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def requests(self) -> list[dict[str, Any]]:
        documents = [json.loads(line) for line in self.lines]
        return [document for document in documents if document.get("event") == "request"]


@pytest.fixture
def written(request: pytest.FixtureRequest) -> Iterator[Written]:
    handler = Written(getattr(request, "param", "json"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def test_the_line_of_a_served_request(written: Written) -> None:
    RequestLog("json", 0.0).on_end(a_life(n=2), "ab" * 16)
    (document,) = written.requests()
    assert document.pop("ts")
    assert document == {
        "level": "info", "process": "gateway-0", "logger": "argosy.request", "message": "request", "event": "request",
        "id": "cmpl-1", "request_id": "req-1", "trace_id": "ab" * 16, "endpoint": "/v1/completions", "model": "tiny",
        "state": "finished", "status": 200, "finish_reason": "length", "replica": "replica-1",
        "prompt_tokens": 12, "completion_tokens": 6, "cached_tokens": 4, "resumes": 2, "preemptions": 0,
        "ttft_ms": 300.0, "queue_ms": 100.0, "prefill_ms": 100.0, "decode_ms": 400.0, "e2e_ms": 1000.0,
        "longest_gap_ms": 350.0, "longest_gap_cause": "resumed",
    }  # fmt: skip


def test_every_field_is_known_to_the_log() -> None:
    for life in (a_life(), refused(), failed()):
        assert fields_of(life).keys() <= FIELDS.keys()
        assert "canary" not in json.dumps(fields_of(life)), "of an error its code, not its words"


def test_failures_and_those_who_left_are_told_apart(written: Written) -> None:
    log = RequestLog("json", 0.0)
    left = a_life()
    left.has_left = True
    for life in (refused(), failed(), left):
        log.on_end(life)
    told = [(d["level"], d["state"], d["status"], d.get("error_code")) for d in written.requests()]
    assert told == [
        ("info", "refused", 404, "model_not_found"),
        ("warning", "failed", 500, "engine_error"),
        ("info", "cancelled", 499, None),
    ]


@pytest.mark.parametrize("written", ["text"], indirect=True)
def test_people_see_failures_and_slow_requests_only(written: Written) -> None:
    log = RequestLog("text", 5.0)
    for life in (a_life(), refused(), failed(), a_life(seconds=6.0)):
        log.on_end(life)
    assert written.lines == [
        "WARNING argosy.request: request cmpl-1 /v1/completions: failed, 500 engine_error after 2.00 s with 12 + 3 "
        "tokens (ttft 0.30 s, queue 0.10 s, prefill 0.10 s, decode 0.40 s); longest gap 0.35 s (resumed)",
        "INFO argosy.request: request cmpl-1 /v1/completions: finished, 200 after 6.00 s with 12 + 3 "
        "tokens (ttft 0.30 s, queue 0.10 s, prefill 0.10 s, decode 0.40 s); longest gap 0.35 s (resumed)",
    ]


@pytest.mark.parametrize("written", ["json", "text"], indirect=True)
def test_a_flood_of_refusals_is_counted_and_leaves_room_for_what_is_served(
    written: Written, request: pytest.FixtureRequest
) -> None:
    log_format = request.node.callspec.params["written"]

    async def scenario() -> None:
        now = 0.0
        log = RequestLog(log_format, 0.0, lambda: now)
        flood = refused() if log_format == "json" else failed()
        flood.choices, flood.is_refused = [], True
        for _ in range(100_000):
            now += 0.001
            log.on_end(flood)
        log.on_end(failed())
        log.close()

    asyncio.run(scenario())
    *lines, served, last = written.lines
    if log_format == "text":
        assert len(lines) > 100, "one a second"
    assert len(lines) <= (1200 + 1 if log_format == "json" else 112)
    assert "failed" in served
    assert f"{100_000 - len(lines)} requests had no line of their own" in last


def test_what_was_left_out_is_told_before_long(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.gateway.request_log.SUMMARY_S", 0.02)
    assert SUMMARY_S == 10.0

    async def scenario() -> None:
        log = RequestLog("json", 0.0, lambda: 0.0)
        for _ in range(300):
            log.on_end(refused())
        await asyncio.sleep(0.1)
        assert json.loads(written.lines[-1])["left_out"] == 300 - len(written.lines) + 1
        log.close()

    asyncio.run(scenario())


def test_the_line_names_the_request_and_quotes_no_client(written: Written) -> None:
    with a_world(Script(text="hello out", frames=(1, 3)), log_format="json") as world:
        for number, body in enumerate(({"n": 2}, {"stop": [CANARY]}, {"stream": True})):
            reply = world.post(
                "/v1/completions",
                {"model": "tiny", "prompt": CANARY, "user": CANARY} | body,
                x_request_id=f"own-{number}",
                authorization=f"Bearer {KEY}",
            )
            assert reply.status_code == 200, reply.text
            until(lambda: len(written.requests()) == number + 1)  # noqa: B023
            line = written.requests()[-1]
            assert line["id"] in reply.text and line["request_id"] == f"own-{number}" and line["prompt_tokens"] > 5
        for raw in (CANARY.encode(), b'{"model": "' + CANARY.encode() + b'"}'):
            hostile = {"x_request_id": f"{CANARY} [31m", "authorization": f"Bearer {KEY}"}
            assert world.post("/v1/completions", raw=raw, **hostile).status_code in (400, 404)
        until(lambda: len(written.requests()) == 5)
    assert not [line for line in written.lines if CANARY in line or KEY in line]


def test_an_unexpected_failure_is_told_with_its_request_and_without_its_words(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(**_: Any) -> None:
        raise RuntimeError(f"cannot render {CANARY}")

    with a_world() as world:
        monkeypatch.setattr("serving.gateway.api.generation.make_request", break_down)
        reply = world.post("/v1/completions", {"model": "tiny", "prompt": CANARY}, x_request_id="own-7")
        assert reply.status_code == 500 and CANARY not in reply.text
        world.plane.script = Script(fail_after=1, failure=EngineError(CANARY))
    until(lambda: any("unexpected failure" in line for line in written.lines))
    (failure,) = [json.loads(line) for line in written.lines if "unexpected failure" in line]
    assert (
        failure["request_id"] == "own-7" and "RuntimeError" in failure["stack"] and "generation.py" in failure["stack"]
    )
    assert CANARY not in "".join(written.lines)
    assert REQUEST_ID.get() == ""


def test_a_line_costs_microseconds(written: Written) -> None:
    log, life = RequestLog("json", 0.0), a_life()
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(100):
            log.on_end(life)
        best = min(best, (time.perf_counter() - begun) / 100)
    assert best < 1e-3
