"""`argosy chat`: a terminal chat against a running server, streamed over /v1/chat/completions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.markup import escape

from serving.logs import printable

TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ChatFailed(Exception):
    """The server could not be reached or refused; the text is for the person at the terminal."""


class Chat:
    """One conversation."""

    def __init__(self, client: httpx.Client, model: str, system: str | None) -> None:
        self._client = client
        self.model = model
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)

    def forget(self) -> None:
        """Begin again, with the same system message."""
        self.messages = list(self._first)

    def say(self, text: str) -> Iterator[str]:
        """Send one message; yields the answer piece by piece and remembers both.

        An answer that was broken off is forgotten together with its question. Raises ChatFailed.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        for event in self._stream({"model": self.model, "messages": asked, "stream": True}):
            for choice in event.get("choices", []):
                piece = choice.get("delta", {}).get("content")
                if piece:
                    pieces.append(piece)
                    yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatFailed(error_of(response))
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    event = msgspec.json.decode(data)
                    if "error" in event:
                        raise ChatFailed(event["error"].get("message", "the stream failed"))
                    yield event
        except httpx.HTTPError as error:
            raise ChatFailed(f"the connection broke: {error}") from None
        raise ChatFailed("the answer was broken off")  # a clean end without [DONE] is no end


def error_of(response: httpx.Response) -> str:
    """The message of an error reply, whatever its shape."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} from {response.url}"


def served_models(client: httpx.Client, url: str) -> list[str]:
    """Raises ChatFailed with how to start a server."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ChatFailed(
            f"no server at {url} ({error}); start one with `argosy serve`, or name it with --url"
        ) from None
    if response.status_code != 200:
        raise ChatFailed(error_of(response))
    return [entry["id"] for entry in response.json()["data"]]


def main(url: str, model: str | None, system: str | None) -> int:
    """Chat until end of input. Returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    url = url.rstrip("/").removesuffix("/v1")  # as the ready line and OpenAI's clients have it
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
            models = served_models(client, url)
            if model is None and not models:
                raise ChatFailed(f"{url} serves no model yet; try again when it is ready")
            if model is not None and model not in models:
                raise ChatFailed(f"{url} does not serve {model!r}; it serves {', '.join(models) or 'nothing'}")
            chat = Chat(client, model or models[0], system)
            console.print(
                f"[dim]{escape(chat.model)} at {url}; /new begins again, Ctrl-C stops an answer, Ctrl-D ends[/dim]"
            )
            return _converse(chat, console)
    except (ChatFailed, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _converse(chat: Chat, console: Console) -> int:
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if text == "/new":
            chat.forget()
        elif text:
            try:
                for piece in chat.say(text):
                    # The model's text is data: no markup, no escape sequence reaches the terminal.
                    shown = "\n".join(printable(line) for line in piece.split("\n"))
                    console.print(shown, end="", markup=False)
                console.print()
            except KeyboardInterrupt:
                console.print(" [dim](stopped)[/dim]")
            except ChatFailed as error:
                console.print(f"\n[red]error:[/red] {escape(str(error))}")
