"""A table for people and one JSON line per result for machines."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def line(*, bench: str, value: float | None, unit: str, **more: Any) -> dict[str, Any]:
    """One result. value None: not measured, and `why` in `more` says why not."""
    common = {"bench": bench, "engine": "argosy", "version": version("argosy"), "value": value, "unit": unit}
    return common | more | {"machine": machine(), "commit": commit()}


def report(title: str, columns: list[str], rows: list[list[str]], lines: list[dict[str, Any]]) -> None:
    """Print the table, then the lines."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    for result in lines:
        print(json.dumps(result, separators=(",", ":")), flush=True)


@functools.cache
def machine() -> str:
    """Processor and core count, as the operating system names them."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [
            row.partition(":")[2].strip() for row in cpuinfo.read_text().splitlines() if row.startswith("model name")
        ]
        if named:
            return f"{named[0]} x{len(named)}"
    return name


@functools.cache
def commit() -> str:
    """Short hash of the checkout, "-dirty" when it has changes, "unknown" outside one."""
    folder = Path(__file__).parent
    try:
        run = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return head + ("-dirty" if run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
