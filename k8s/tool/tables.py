"""How the tool prints: tables and sentences for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

VERSION: Final = 1
"""Of every JSON document: fields are only added while it stays."""


PIPE_WIDTH: Final = 200
"""Columns where no terminal says how many there are."""


def make_console() -> Console:
    """Of the standard output; a pipe gets wide tables, in which nothing is broken."""
    found = Console()
    return found if found.is_terminal else Console(width=PIPE_WIDTH)


def print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"version": VERSION, **document}, indent=2, default=str) + "\n")


def say(console: Console, text: str, style: str = "") -> None:
    """As one line: a terminal wraps it, and a pipe gets it whole. Square brackets are text."""
    console.print(text, style=style or None, highlight=False, markup=False, soft_wrap=True)


def table(title: str, names: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, num_right: int = 0) -> Table:
    """The last `num_right` columns hold numbers; the first one is never wrapped."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, name in enumerate(names):
        is_number = i >= len(names) - num_right
        made.add_column(name, justify="right" if is_number else "left", no_wrap=i == 0 or is_number, overflow="fold")
    for row in rows:
        made.add_row(*(cell.replace("[", r"\[") for cell in row))
    return made
