"""GET /v1/requests and GET /v1/requests/{id}: who may ask, and what is answered."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.errors import EngineError, NoCapacity
from tests.gateway.world import MODEL, Script, World, a_world, until

TOKEN = "an-operator-token-of-24-b"


def ended(world: World) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = world.get("/v1/requests?state=ended").json()["data"]
    return found


def test_a_request_is_found_by_the_id_of_its_body_and_by_its_x_request_id() -> None:
    with a_world(Script(gap_s=0.002, queue_s=0.03)) as world:
        reply = world.post(
            "/v1/completions", {"model": MODEL, "prompt": ["hi", "ho"], "n": 2, "seed": 1}, x_request_id="mine"
        )
        body = reply.json()
        account = world.get(f"/v1/requests/{body['id']}").json()
        assert account == world.get("/v1/requests/mine").json()
    assert account["state"] == "finished" and account["request_id"] == "mine"
    assert (account["endpoint"], account["model"], account["n"]) == ("/v1/completions", MODEL, 2)
    assert account["prompt_tokens"] == body["usage"]["prompt_tokens"] == 4, "a prompt once, however many choices"
    assert account["completion_tokens"] == body["usage"]["completion_tokens"]
    assert [choice["finish_reason"] for choice in account["choices"]] == ["stop"] * 4
    assert [event["kind"] for event in account["events"]][-1] == "tokenised"
    assert account["elapsed_s"] >= account["summary"].get("time_to_first_token_s", 0.0)
    assert not any("hi" in str(value) for value in account.values()), "no prompt, no text"


def test_a_running_request_is_listed_first_and_shown_while_it_runs() -> None:
    with a_world(Script(gap_s=0.05)) as world:
        world.complete()
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with httpx.stream("POST", f"{world.url}/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            listed = world.get("/v1/requests").json()
            assert listed["num_running"] == 1 and listed["object"] == "list"
            first, second = listed["data"]
            assert first["stream"] and first["endpoint"] == "/v1/chat/completions" and second["state"] == "finished"
            assert [e["id"] for e in world.get("/v1/requests?state=running").json()["data"]] == [first["id"]]
            assert world.get(f"/v1/requests/{first['id']}").json()["elapsed_s"] > 0
            assert len(world.get("/v1/requests?limit=1").json()["data"]) == 1
        until(lambda: world.get("/v1/requests").json()["num_running"] == 0)
        assert ended(world)[0]["state"] == "cancelled", "the client left in the middle"


@pytest.mark.parametrize(
    ("script", "state", "code"),
    [
        (Script(failure=EngineError("It broke."), fail_after=0), "failed", "engine_error"),
        (Script(failure=EngineError("It broke."), fail_after=2), "failed", "engine_error"),
    ],
)
def test_a_failure_is_told_with_its_code(script: Script, state: str, code: str) -> None:
    with a_world(script) as world:
        for stream in (False, True):
            with pytest.raises(httpx.RemoteProtocolError) if stream and script.fail_after else contextlib.nullcontext():
                world.complete(stream=stream)
            until(lambda: world.get("/v1/requests").json()["num_running"] == 0)
            entry = ended(world)[0]
            assert (entry["error_code"], entry["stream"]) == (code, stream)


def test_what_is_refused_is_told_too() -> None:
    with a_world() as world:
        world.complete(max_tokens=-1)
        world.post("/v1/completions", raw=b"{")
        world.plane.refusal = NoCapacity("The queue is full.", retry_after_s=3, reason="saturated")
        world.complete()
        entries = ended(world)
        assert [(entry["state"], entry["error_code"]) for entry in entries] == [
            ("refused", "no_capacity"),
            ("refused", "invalid_json"),
            ("refused", "invalid_value"),
        ]
        assert entries[0]["id"].startswith("cmpl-") and entries[1]["id"] == ""
        account = world.get(f"/v1/requests/{entries[1]['request_id']}").json()
        assert account["error"]["code"] == "invalid_json" and account["choices"] == []


def test_a_client_that_leaves_in_its_body_is_told_as_cancelled() -> None:
    with a_world() as world:
        with socket.create_connection(("127.0.0.1", world.port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            until(lambda: world.get("/v1/requests").json()["num_running"] == 1)
        until(lambda: world.get("/v1/requests").json()["num_running"] == 0)
        assert ended(world)[0]["state"] == "cancelled"


def test_the_trace_opens_in_a_viewer_of_chromes_format() -> None:
    with a_world() as world:
        name = world.complete().json()["id"]
        trace = world.get(f"/v1/requests/{name}?format=chrome").json()
    assert {event["ph"] for event in trace["traceEvents"]} <= {"M", "X", "i"}
    assert all(event["pid"] == 1 for event in trace["traceEvents"])
    assert trace["otherData"]["id"] == name


def test_bad_questions_are_refused_by_name() -> None:
    with a_world() as world:
        for query in ("limit=0", "limit=501", "limit=x", "limit=%C2%B2", "state=dead"):
            reply = world.get(f"/v1/requests?{query}")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.partition("=")[0])
        assert world.get("/v1/requests/x?format=png").json()["error"]["param"] == "format"
        missing = world.get("/v1/requests/cmpl-none")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
        assert world.post("/v1/requests", {}).status_code == 405


# --- who may ask ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [{"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=127.0.0.1"}, {"via": "1.1 proxy"}, {"host": "evil.example"},
     {"host": "localhost.evil.example"}, {"host": "127.0.0.1.evil.example:80"}],
)  # fmt: skip
def test_whoever_comes_through_a_proxy_or_under_another_name_is_no_operator(header: dict[str, str]) -> None:
    with a_world() as world:
        name = world.complete().json()["id"]
        for path in ("/v1/requests", f"/v1/requests/{name}", "/v1/requests/unknown"):
            reply = httpx.get(world.url + path, headers=header)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "operator_only")
            assert "operator_token_file" in reply.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST:1"])
def test_the_machine_itself_is_an_operator_under_its_local_names(host: str) -> None:
    with a_world() as world:
        assert httpx.get(f"{world.url}/v1/requests", headers={"host": host}).status_code == 200


def test_the_operator_token_opens_from_anywhere_and_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")

    def ask(given: str | None) -> tuple[int, str | None]:
        headers = {"x-forwarded-for": "192.0.2.1"} | ({} if given is None else {"authorization": given})
        reply = httpx.get(f"{world.url}/v1/requests", headers=headers)
        return reply.status_code, reply.headers.get("www-authenticate")

    with a_world(operator_token_file=str(file)) as world:
        assert ask(f"Bearer {TOKEN}") == ask(f"bearer  {TOKEN}") == (200, None)
        for wrong in (None, "", "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN):
            assert ask(wrong) == (401, "Bearer"), wrong
        new = tmp_path / "new"
        new.write_text("another-operator-token")
        new.replace(file)  # as Kubernetes renews a mounted secret
        assert ask(f"Bearer {TOKEN}")[0] == 401 and ask("Bearer another-operator-token")[0] == 200
        file.write_text("short")
        assert ask("Bearer short")[0] == 403, "too short to be one"
        file.unlink()
        assert ask("Bearer another-operator-token")[0] == 403
        assert world.get("/v1/requests").status_code == 200, "the machine itself needs none"
