"""What a terminal shows while a run goes on, in a process of its own: drawing takes nothing from the generator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

QUIET_EVERY_S = 10.0


def follow(
    lines: Iterable[str], console: Console, duration_s: float | None, num_requests: int | None
) -> dict[str, Any]:
    """Draw until the lines end; returns the last of them. Without a terminal, a line of text every 10 s."""
    last: dict[str, Any] = {}
    said_at = time.monotonic()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        for line in lines:
            try:
                last = json.loads(line)
            except ValueError:
                continue
            if console.is_terminal:
                live.update(_drawn(last, duration_s, num_requests))
            elif time.monotonic() - said_at >= QUIET_EVERY_S:
                said_at = time.monotonic()
                console.print(_words(last), highlight=False)
    return last


def _drawn(state: dict[str, Any], duration_s: float | None, num_requests: int | None) -> Group:
    fraction = 0.0
    if duration_s:
        fraction = state["elapsed_s"] / duration_s
    elif num_requests:
        fraction = state["done"] / num_requests
    table = Table.grid(padding=(0, 2))
    table.add_row(
        Text(state["stage"], style="bold"),
        ProgressBar(total=1.0, completed=min(fraction, 1.0), width=30),
        Text(_words(state)),
    )
    return Group(table)


def _words(state: dict[str, Any]) -> str:
    elapsed = max(state["elapsed_s"], 1e-9)
    words = [f"{state['elapsed_s']:.0f} s", f"{state['done']} done", f"{state['in_flight']} in flight"]
    words.append(f"{state['tokens'] / elapsed:.0f} tok/s")
    for name, key in (("TTFT", "ttft_s"), ("ITL", "itl_s")):
        if state[key]:
            words.append(f"{name} {1e3 * state[key][0]:.0f}/{1e3 * state[key][1]:.0f} ms")
    if state["failed"]:
        words.append(f"{state['failed']} failed")
    return " · ".join(words)
