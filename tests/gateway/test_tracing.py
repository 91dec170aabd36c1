"""Spans of a real gateway in a real collector."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from serving import found
from serving.config import load
from serving.errors import EngineError, SettingsError
from serving.gateway import tracing
from serving.gateway.tracing import MAX_TRACESTATE_CHARS, Tracing, bounded_tracestate, caller_of, traces_url
from serving.supervisor import free_port
from tests.collector import Collector, Seen, a_collector
from tests.gateway.lives import ARRIVED_WALL, a_life, failed, random_life, refused
from tests.gateway.world import Script, a_world

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
CANARY = "canary-of-a-prompt"
KEY = "sk-canary-of-a-key"
SERVER = 2


def exported(*lives: Any, share: float = 1.0) -> tuple[Collector, list[str]]:
    """What a collector has of these lives, and the trace ids that were told."""
    with a_collector() as collector:
        traces = Tracing(collector.url, share, "gateway-0")
        ids = [traces.on_end(life) for life in lives]
        traces.close()
        assert traces.num_dropped == 0 and traces.num_exported == len(collector.spans)
    return collector, ids


def assert_nested(collector: Collector, span: Seen) -> int:
    """Every descendant lies within its parent and belongs to one trace. Returns how many there are."""
    children = collector.children(span)
    for child in children:
        assert span.begun <= child.begun <= child.ended <= span.ended, (span.name, child.name)
        assert child.kind == 1  # internal
    return sum(1 + assert_nested(collector, child) for child in children)


def test_a_request_is_a_tree_of_spans_with_the_conventions_names() -> None:
    collector, (trace_id,) = exported(a_life())
    (root,) = collector.roots()
    assert (root.name, root.parent_id, root.trace_id) == ("POST /v1/completions", "", trace_id)
    assert root.begun == pytest.approx(ARRIVED_WALL * 1e9, abs=1000)
    assert root.ended - root.begun == pytest.approx(1e9, abs=1000)
    assert assert_nested(collector, root) + 1 == len(collector.spans)
    names = [child.name for child in collector.children(root)]
    assert names == ["read", "tokenise", "queue", "prefill", "decode"]
    assert root.attributes.items() >= {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "argosy", "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "cmpl-1", "gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4, "argosy.request_id": "req-1", "argosy.resumes": 1,
        "argosy.longest_gap_cause": "resumed",
    }.items()  # fmt: skip
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"] and root.status == (0, "")
    (decode,) = [span for span in collector.spans if span.name == "decode"]
    (resume,) = collector.children(decode)
    assert resume.name == "resume" and [child.name for child in collector.children(resume)] == ["queue", "prefill"]
    (gap,) = [event for event in decode.events if event[0] == "gap"]
    assert gap[2]["argosy.cause"] == "resumed" and "replica-0 was lost" in gap[2]["argosy.detail"]
    assert collector.resources[0].items() >= {"service.name": "argosy", "service.instance.id": "gateway-0"}.items()
    assert set(collector.paths) == {"/v1/traces"}


def test_a_failure_is_an_error_with_its_code_and_a_refusal_is_the_clients() -> None:
    collector, _ = exported(failed(), refused())
    broken, not_found = collector.roots()
    assert broken.status == (2, "engine_error") and broken.attributes["error.type"] == "engine_error"
    assert not_found.status == (0, "") and not_found.attributes["error.type"] == "model_not_found"
    assert not_found.attributes["http.response.status_code"] == 404
    assert b"canary" not in collector.raw, "of an error its code, not its words"


def test_any_life_becomes_nested_spans() -> None:
    collector, ids = exported(*map(random_life, range(15)))
    roots = collector.roots()
    assert len(roots) == 15 and {root.trace_id for root in roots} == set(ids)
    assert sum(1 + assert_nested(collector, root) for root in roots) == len(collector.spans)


@pytest.mark.parametrize(
    ("traceparent", "is_child"),
    [
        (PARENT, True),
        (f"  {PARENT}\t", True),
        (f"01-{TRACE}-{SPAN}-01-what-the-future-brings", True),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"00-{TRACE}-{SPAN}-1", False),
        (f"00-{TRACE}x-{SPAN}-01", False),
        ("\x1b[31m" + CANARY, False),
        ("", False),
    ],
)
def test_a_callers_context_is_taken_as_w3c_says(traceparent: str, is_child: bool) -> None:
    collector, (trace_id,) = exported(a_life(trace=(traceparent, "vendor=value")))
    (root,) = collector.roots()
    assert (root.parent_id == SPAN and root.trace_id == TRACE == trace_id) is is_child
    assert root.parent_id in (SPAN, "") and root.trace_state == ("vendor=value" if is_child else "")
    assert CANARY.encode() not in collector.raw


def test_a_tracestate_that_is_malformed_does_not_cost_the_parent() -> None:
    for given, kept in (
        ("a=1,b=2", "a=1,b=2"),
        ("a=1,,b=2", "a=1,b=2"),
        ("a=1,a=2", ""),
        ("not a member", ""),
        ("A=1\r\nx: y", ""),
    ):
        collector, _ = exported(a_life(trace=(PARENT, given)))
        (root,) = collector.roots()
        assert (root.parent_id, root.trace_state) == (SPAN, kept)


def test_what_is_kept_of_a_callers_headers_is_bounded() -> None:
    def caller(**given: str | list[str]) -> tuple[str, str]:
        pairs = [
            (name, value)
            for name, values in given.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        return caller_of(Headers(raw=[(name.encode(), value.encode()) for name, value in pairs]))

    assert caller() == ("", "")
    assert caller(traceparent=PARENT, tracestate=["a=1", "b=2"]) == (PARENT, "a=1,b=2")
    assert caller(traceparent=[PARENT, PARENT], tracestate="a=1") == ("", "")
    assert caller(traceparent=f"01-{TRACE}-{SPAN}-01-" + "x" * 8000) == ("", "")
    long = ",".join([f"long={'x' * 200}", *(f"k{number}=v{number}" for number in range(100))])
    _, tracestate = caller(traceparent=PARENT, tracestate=[long, long])
    assert tracestate.startswith("k0=v0,k1=v1,") and len(tracestate) <= MAX_TRACESTATE_CHARS
    for length in (511, 512, 513, 5000):
        assert len(bounded_tracestate("a=1," * (length // 4))) <= MAX_TRACESTATE_CHARS
    assert bounded_tracestate("k=" + "v" * 509) == "k=" + "v" * 509


def test_a_callers_decision_wins_over_our_share() -> None:
    for share in (0.0, 1.0):
        collector, ids = exported(
            a_life(), a_life(trace=(PARENT, "")), a_life(trace=(PARENT[:-2] + "00", "")), share=share
        )
        assert [bool(trace_id) for trace_id in ids] == [share == 1.0, True, False]
        assert len(collector.roots()) == sum(map(bool, ids))
    collector, ids = exported(*(a_life() for _ in range(400)), share=0.25)
    assert 50 < len(collector.roots()) == sum(map(bool, ids)) < 150


def test_a_gateway_exports_what_clients_send_it_and_no_text() -> None:
    with a_collector() as collector:
        with a_world(Script(text=CANARY, frames=(1, 2)), trace_endpoint=collector.url) as world:
            for traceparent in (PARENT, f"00-{CANARY}-01"):
                headers = {"traceparent": traceparent, "tracestate": "a=b", "authorization": f"Bearer {KEY}"}
                body = {"model": "tiny", "prompt": CANARY, "stop": [CANARY + "2"], "user": CANARY, "n": 2}
                assert world.post("/v1/completions", body, **headers).status_code == 200
                assert world.post("/v1/completions", body | {"model": CANARY}, **headers).status_code == 404
            world.plane.script = Script(fail_after=0, failure=EngineError(CANARY))
            assert world.chat(messages=[{"role": "user", "content": CANARY}]).status_code == 500
        roots = collector.roots()  # the end of the gateway has flushed them
        assert [root.attributes["http.response.status_code"] for root in roots] == [200, 404, 200, 404, 500]
        assert [root.parent_id for root in roots] == [SPAN, SPAN, "", "", ""]
        assert roots[4].name == "POST /v1/chat/completions" and roots[4].attributes["gen_ai.operation.name"] == "chat"
        assert len({root.trace_id for root in roots}) == 4
    assert CANARY.encode() not in collector.raw and KEY.encode() not in collector.raw


def times_of(world: Any, count: int) -> float:
    """The slowest of some requests, in seconds."""
    slowest = 0.0
    with httpx.Client(base_url=world.url) as client:
        for _ in range(count):
            begun = time.monotonic()
            assert client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"}).status_code == 200
            slowest = max(slowest, time.monotonic() - begun)
    return slowest


def test_a_dead_collector_costs_spans_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "MAX_WAITING_SPANS", 60)
    with a_world(trace_endpoint=f"http://127.0.0.1:{free_port()}") as world:
        assert times_of(world, 60) < 0.5
        traces = world.server.tracing
        assert traces is not None
        [line] = re.findall(r"^argosy_trace_spans_dropped_total (.*)$", httpx.get(f"{world.url}/metrics").text, re.M)
        assert float(line) > 0
        begun = time.monotonic()
    assert time.monotonic() - begun < 4.0, "the end is bounded"
    assert traces.num_dropped >= 60 and traces.num_exported == 0
    complaints = [record.getMessage() for record in caplog.records if record.name == "argosy.tracing"]
    assert 1 <= len(complaints) <= 3 and "spans dropped" in complaints[0]
    assert not [record for record in caplog.records if record.name.startswith(("opentelemetry", "urllib3"))]


def test_a_collector_that_answers_nothing_costs_spans_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_WAITING_SPANS", 40)
    monkeypatch.setattr(tracing, "DELAY_S", 0.05)
    with a_collector() as collector:
        collector.is_stuck = True
        with a_world(trace_endpoint=collector.url) as world:
            assert times_of(world, 60) < 0.5
            traces = world.server.tracing
            assert traces is not None and traces.num_dropped > 0, "what waits is bounded"
            begun = time.monotonic()
        assert time.monotonic() - begun < 4.0, "the end is bounded"


def test_a_collector_that_comes_back_gets_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "DELAY_S", 0.05)
    with a_collector() as collector:
        collector.status = 400
        with a_world(trace_endpoint=collector.url) as world:
            times_of(world, 3)
            traces = world.server.tracing
            assert traces is not None
            collector.wait_for(lambda: traces.num_dropped >= 3)
            collector.status = 200
            times_of(world, 2)
        assert len(collector.roots()) == 2


def test_the_spans_of_a_request_cost_the_loop_less_than_a_token() -> None:
    traces = Tracing(f"http://127.0.0.1:{free_port()}", 1.0, "gateway-0")
    off = Tracing(f"http://127.0.0.1:{free_port()}", 0.0, "gateway-0")
    life = a_life()

    def cost(one: Tracing) -> float:
        best = float("inf")
        for _ in range(20):
            begun = time.perf_counter()
            for _ in range(5):
                one.on_end(life)
            best = min(best, (time.perf_counter() - begun) / 5)
        return best

    assert cost(off) < 2e-4
    assert cost(traces) < 3e-3
    traces.close()
    off.close()


def test_what_an_endpoint_means() -> None:
    assert traces_url("http://localhost:4318") == "http://localhost:4318/v1/traces"
    assert traces_url("https://host/") == "https://host/v1/traces"
    assert traces_url("https://host/otlp/v1/traces") == "https://host/otlp/v1/traces"


def test_settings_that_cannot_work_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, said in (
        ({"trace_endpoint": "localhost:4318"}, "--trace-endpoint: 'localhost:4318' is no http:// or https:// URL"),
        ({"trace_sample": "1.5"}, "--trace-sample: 1.5 is outside 0 to 1"),
        ({"log_format": "xml"}, "--log-format: 'xml' is not one of text, json"),
    ):
        with pytest.raises(SettingsError) as raised:
            load(flags, environ={"HOME": "/tmp"})
        assert said in str(raised.value)
    settings = load({"trace_endpoint": "http://localhost:4318"}, environ={"HOME": "/tmp"})
    found.check_tracing(settings)
    monkeypatch.setattr(found, "_TRACING", "no-such-distribution")
    with pytest.raises(SettingsError, match=r"pip install 'argosy\[tracing\]'"):
        found.check_tracing(settings)
    found.check_tracing(load({}, environ={"HOME": "/tmp"}))


def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    program = (
        "import sys; import serving.gateway.server; from tests.gateway.world import a_world\n"
        "with a_world() as world: assert world.complete().status_code == 200\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
