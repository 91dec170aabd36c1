"""The terminal chat against a server that answers what a test wrote down."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from serving.chat import Chat, ChatFailed, served_models
from serving.logs import printable


@contextlib.contextmanager
def server(status: int, body: str, heard: list[dict[str, Any]] | None = None) -> Iterator[httpx.Client]:
    """A client of a server that gives one answer to every request; `heard` collects the JSON it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if heard is not None:
                heard.append(msgspec.json.decode(sent))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{httpd.server_port}", trust_env=False) as client:
                yield client
        finally:
            httpd.shutdown()


def events(*pieces: str, end: str = "data: [DONE]\n\n") -> str:
    deltas = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    return "".join(f"data: {msgspec.json.encode(delta).decode()}\n\n" for delta in deltas) + ": a comment\n" + end


def test_an_answer_streams_and_becomes_part_of_the_conversation() -> None:
    heard: list[dict[str, Any]] = []
    with server(200, events("Hel", "lo ", "☃"), heard) as client:
        chat = Chat(client, "tiny", "Be brief.")
        assert list(chat.say("Hi")) == ["Hel", "lo ", "☃"]
        list(chat.say("Again"))
    assert [message["content"] for message in heard[1]["messages"]] == ["Be brief.", "Hi", "Hello ☃", "Again"]
    assert heard[0]["stream"] is True and heard[0]["model"] == "tiny"
    chat.forget()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "broken off"),
        ('data: {"error": {"message": "The engine failed."}}\n\n', "The engine failed."),
    ],
)
def test_a_broken_answer_is_an_error_and_leaves_no_half_turn(end: str, message: str) -> None:
    with server(200, events("Half", end=end)) as client:
        chat = Chat(client, "tiny", None)
        with pytest.raises(ChatFailed, match=message):
            list(chat.say("Hi"))
        assert chat.messages == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "Too many tokens."}}', "Too many tokens."),
        ("<html>", "400 from http"),
        ("[]", "400 from"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(body: str, message: str) -> None:
    with server(400, body) as client, pytest.raises(ChatFailed, match=message):
        list(Chat(client, "tiny", None).say("Hi"))


def test_models_are_listed() -> None:
    with server(200, '{"object": "list", "data": [{"id": "a"}, {"id": "b"}]}') as client:
        assert served_models(client, "http://x") == ["a", "b"]


def test_what_a_model_or_a_log_says_cannot_drive_the_terminal() -> None:
    assert printable("\x1b[2Jred\x07\tok é") == " [2Jred \tok é"
