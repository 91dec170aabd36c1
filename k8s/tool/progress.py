"""What a long command tells while it runs: a live display for people, lines for a pipe, JSON events for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

_SIGNS = {"warning": "[yellow]![/]", "error": "[red]x[/]", "done": "[green]+[/]"}


class Progress(Protocol):
    """Where events go. Use as a context manager."""

    def __enter__(self) -> Progress: ...
    def __exit__(self, *_: object) -> None: ...

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """One event: `event` names its kind for programs, `text` says it to people."""

    def standing(self, goals: Mapping[str, str], why: list[str]) -> None:
        """What is waited for -> where it is; and the reasons. Told again only when it changes."""


class JsonProgress:
    """An object a line: {"event", "time", "text", ...}."""

    def __init__(self) -> None:
        self._last: Any = None

    def __enter__(self) -> JsonProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, event: str, text: str, **facts: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), "text": text, **facts}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def standing(self, goals: Mapping[str, str], why: list[str]) -> None:
        if (dict(goals), why) != self._last:
            self._last = dict(goals), list(why)
            self.tell(
                "waiting", "; ".join(f"{name}: {text}" for name, text in goals.items()), goals=dict(goals), why=why
            )


class TextProgress:
    """Events stay; what is waited for is drawn below them and drawn again, or, on no terminal, told when it changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last: list[str] = []

    def __enter__(self) -> TextProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, event: str, text: str, **facts: Any) -> None:
        del facts
        sign = _SIGNS.get(event, " ")
        self._console.print(f"{sign} ", end="")
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        if self._live is not None:
            self._live.update(Text(""))

    def standing(self, goals: Mapping[str, str], why: list[str]) -> None:
        lines = [f"{name}: {text}" for name, text in goals.items()]
        if self._live is not None:
            parts: list[Any] = [Spinner("dots", Text(line)) for line in lines]
            self._live.update(Group(*parts, *(Text(f"    {reason}", style="yellow") for reason in why[:8])))
        elif [*lines, *why] != self._last:
            self._last = [*lines, *why]
            for line in lines:
                self._console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
            for reason in why[:8]:
                self._console.print(f"    {reason}", highlight=False, markup=False, soft_wrap=True)
