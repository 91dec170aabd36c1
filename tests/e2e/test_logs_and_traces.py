"""What a real service writes and exports while clients are hostile and replicas die: all of it, and no secret."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from serving.logs import FIELDS, LEVELS
from serving.supervisor import free_port
from tests.collector import Collector, Seen, a_collector
from tests.e2e.service import Service, serving
from tests.tiny import tiny_model_folder

MODEL = "tiny"
CANARY = "canary-of-a-prompt"
KEY = "sk-canary-of-a-key"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
HEADERS = {"authorization": f"Bearer {KEY}", "x-api-key": KEY, "cookie": KEY}


@dataclasses.dataclass
class Ran:
    """One run of a service, over by now."""

    output: bytes
    collector: Collector
    secrets: list[bytes]
    usages: dict[str, dict[str, Any]]  # by x-request-id

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.decode().split("\n")[:-1]]

    def requests(self) -> dict[str, dict[str, Any]]:
        return {line["request_id"]: line for line in self.lines if line.get("event") == "request"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("logs")
    # Wide enough that a blow finds a stream running.
    model = tiny_model_folder(folder / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    with a_collector() as collector:
        flags = ("--runtime", "local", "--replicas", "2", "--model", str(model), "--served-model-name", MODEL)
        asked = ("--log-format", "json", "--trace-endpoint", collector.url)
        with serving(folder, *flags, *asked, "--kv-cache-bytes", "64MiB") as service:
            secrets = [path.read_bytes() for path in Path(tempfile.gettempdir()).glob("argosy-*/secret")]
            usages = {name: ask(service, name, **body) for name, body in BODIES.items()}
            usages["stopped"] = ask(service, "stopped", prompt=CANARY, max_tokens=60, stop=[a_stop(service)])
            be_hostile(service)
            usages["resumed"] = kill_under_a_stream(service)
            service.wait_until_ready(30)
            collector.wait_for(lambda: len(collector.roots()) == len(usages) + 5)
            kill_the_gateway(service)
            usages["last"] = ask(service, "last", prompt=CANARY)  # told by the end of the service
        return Ran((folder / "serve.log").read_bytes(), collector, secrets, usages)


BODIES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": f"{CANARY} {CANARY} once upon a time", "user": CANARY},
    "again": {"prompt": f"{CANARY} {CANARY} once upon a time"},
    "choices": {"prompt": CANARY, "n": 3, "temperature": 1.0, "seed": 3},
    "prompts": {"prompt": [CANARY, "other", CANARY + " other"], "n": 2},
    "one": {"prompt": CANARY, "max_tokens": 1},
}


def ask(service: Service, name: str, **body: Any) -> dict[str, Any]:
    document = {"model": MODEL, "max_tokens": 12, "ignore_eos": True, "temperature": 0} | body
    headers = HEADERS | {"x-request-id": name, "traceparent": PARENT, "tracestate": "vendor=1"}
    reply = service.http.post("/v1/completions", json=document, headers=headers)
    assert reply.status_code == 200, reply.text
    usage: dict[str, Any] = reply.json()["usage"]
    return usage


def a_stop(service: Service) -> str:
    """Two characters of an output's middle: the engine is some tokens ahead when they are seen."""
    body = {"model": MODEL, "prompt": CANARY, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    text: str = service.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text[20:22]


def be_hostile(service: Service) -> None:
    for body in (
        {"model": f"{CANARY}\r\n\x1b[31m", "prompt": CANARY},
        {"model": MODEL, "prompt": CANARY, "temperature": CANARY},
        {"model": MODEL, "prompt": [CANARY, 1]},
        {"model": MODEL, "prompt": CANARY, CANARY: 1},
    ):
        assert service.http.post("/v1/completions", json=body, headers=HEADERS).status_code in (400, 404)
    forged = '{"ts":"2026-01-01T00:00:00.000Z","level":"info","process":"supervisor","logger":"x","message":"forged"}'
    for head in (
        f"GET /{CANARY} HTTP/1.1\r\nHost: x\r\nx-request-id: \x1b[31m{CANARY}\r\n",
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-request-id: a\x1e{forged}\r\nauthorization: Bearer {KEY}\r\n"
        f"traceparent: {CANARY}\r\ntracestate: {'x' * 5000}\r\ncontent-length: 2\r\n",
        f"BAD {CANARY}\r\n{CANARY}: {KEY}\r\n",
        f"GET / HTTP/1.1\r\nx: {'y' * 20_000}{CANARY}\r\n",
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as client:
            client.sendall(head.encode("latin-1") + b"\r\n{}")
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(1 << 16):
                    pass


def kill_under_a_stream(service: Service) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": CANARY, "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    usage: dict[str, Any] = {}
    headers = HEADERS | {"x-request-id": "resumed", "traceparent": PARENT}
    with service.http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        for number, line in enumerate(line for line in reply.iter_lines() if line.startswith("data: {")):
            if number == 20:
                (busy,) = [r for r in service.replicas() if r.get("num_running")] or service.replicas()[:1]
                os.kill(busy["ranks"][0]["pid"], signal.SIGKILL)
            usage = json.loads(line[6:]).get("usage") or usage
    return usage


def kill_the_gateway(service: Service) -> None:
    children = [
        int(pid)
        for path in Path(f"/proc/{service.process.pid}/task").glob("*/children")
        for pid in path.read_text().split()
    ]
    (gateway,) = [pid for pid in children if b"serving.gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(gateway, signal.SIGKILL)
    time.sleep(0.2)
    service.wait_until_ready(30)


def test_every_line_is_one_object_of_known_fields(ran: Ran) -> None:
    assert re.fullmatch(rb"([ -~]+\n)+", ran.output)
    for line in ran.lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
        assert line["level"] in LEVELS and line["process"] in ("supervisor", "gateway-0", "local", "local-0", "local-1")
        assert line.keys() <= {"ts", "level", "process", "logger", "message"} | FIELDS.keys()
        assert line["message"] and line["message"] != "forged"
    told = [line.get("event") for line in ran.lines if line["process"] == "supervisor"]
    assert "ready" in told and "phase" in told and told[-1] == "stopping"
    said = [(line["level"], line["message"]) for line in ran.lines if line["process"] == "supervisor"]
    assert ("warning", "the gateway was killed by SIGKILL; restarting") in said
    assert any(level == "warning" and "was killed by SIGKILL; restarting" in text for level, text in said)


def test_no_prompt_no_key_and_no_secret_is_anywhere(ran: Ran) -> None:
    assert ran.secrets
    for told in (ran.output, ran.collector.raw):
        for word in (CANARY.encode(), KEY.encode(), b"Bearer", *ran.secrets, *(s.hex().encode() for s in ran.secrets)):
            assert word not in told


def test_every_request_has_a_line_that_agrees_with_its_usage(ran: Ran) -> None:
    requests = ran.requests()
    for name, usage in ran.usages.items():
        line = requests[name]
        assert (line["state"], line["status"], line["model"]) == ("finished", 200, MODEL)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )
        assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"], name
        assert (
            line["trace_id"] == TRACE
            and line["finish_reason"] == ("stop" if name == "stopped" else "length")
            and line["replica"].startswith("local-")
        )
        assert 0 <= line["queue_ms"] + line["prefill_ms"] <= line["ttft_ms"] + 0.01
        assert line["ttft_ms"] + line["decode_ms"] <= line["e2e_ms"] + 0.01
    assert requests["resumed"]["resumes"] == 1 and requests["again"]["cached_tokens"] > 0
    refused = [line for line in requests.values() if line["state"] == "refused"]
    assert sorted((line["status"], line["error_code"]) for line in refused)[-1] == (404, "model_not_found")
    assert len(refused) == 4, "the others were no HTTP"
    for line in refused:
        assert re.fullmatch(r"req-[0-9a-f]{26}", line["request_id"]) and "id" not in line


def assert_nested(collector: Collector, span: Seen) -> None:
    for child in collector.children(span):
        assert span.begun <= child.begun <= child.ended <= span.ended, (span.name, child.name)
        assert_nested(collector, child)


def test_every_request_has_its_spans(ran: Ran) -> None:
    roots = {root.attributes["argosy.request_id"]: root for root in ran.collector.roots()}
    lines = ran.requests()
    assert roots.keys() == lines.keys()
    for name, root in roots.items():
        assert root.trace_id == lines[name]["trace_id"]
        assert (root.ended - root.begun) / 1e6 == pytest.approx(lines[name]["e2e_ms"], abs=0.01)
        assert_nested(ran.collector, root)
        if name in ran.usages:
            assert (root.trace_id, root.parent_id) == tuple(PARENT.split("-")[1:3])
            kinds = {child.name for child in ran.collector.children(root)}
            assert kinds >= {"tokenise", "prefill", "decode"}
            assert root.attributes["gen_ai.usage.output_tokens"] == ran.usages[name]["completion_tokens"]
    children = ran.collector.children(roots["resumed"])
    (decode,) = [child for child in children if child.name == "decode"]
    (resume,) = [child for child in ran.collector.children(decode) if child.name == "resume"]
    assert resume.attributes["argosy.cause"] == "lost"
    prefill = ran.collector.children(resume)[-1]
    assert prefill.name == "prefill" and prefill.attributes["argosy.resumed_tokens"] >= 20
    assert prefill.attributes["argosy.replica"] != resume.attributes["argosy.replica"]


def test_a_start_that_fails_says_so_in_json_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "canary\x1b[31m"}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, code in (
            (("--port", str(taken.getsockname()[1])), 2),
            (("--port", str(free_port()), "--model", str(tmp_path)), 2),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "serving.cli", "serve", "--runtime", "local", "--log-format", "json", *flags],
                capture_output=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == code and done.stdout == b""
            assert re.fullmatch(rb"([ -~]+\n)+", done.stderr)
            last = [json.loads(line) for line in done.stderr.splitlines()][-1]
            assert (last["level"], last["event"]) == ("error", "failed")


def test_a_server_without_the_extra_refuses_to_trace(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "def version(name):\n"
        "    if name.startswith('opentelemetry-exporter'):\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "serve", "--trace-endpoint", "http://127.0.0.1:4318"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "pip install 'argosy[tracing]'" in done.stderr
