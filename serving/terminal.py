"""What `argosy serve` shows: a progress display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from serving.logs import printable

MAX_WAITING_LINES: Final = 1000


class Terminal:
    """The supervisor's view.

    Lines are printed by a thread of their own from a bounded queue: a terminal that stands still
    (Ctrl-S, a stuck pipe) must not stop the process that restarts dead children.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._output = Console(highlight=False, soft_wrap=True)
        self._phases: list[tuple[str, str, float]] = []
        self._loaded: dict[str, tuple[int, float]] = {}  # who -> (bytes, seconds)
        self._loads: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._pull: TaskID | None = None
        self._dropped = 0
        self._is_ready = False
        self._lines: queue.Queue[tuple[Console, str] | None] = queue.Queue(MAX_WAITING_LINES)
        self._printer = threading.Thread(target=self._print, name="terminal", daemon=True)
        self._printer.start()
        if self._errors.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}", style="dim"),
                TimeElapsedColumn(),
                console=self._errors,
                transient=True,
            )
            self._task = self._progress.add_task(f"starting {escape(model)}", total=None, detail="")
            self._progress.start()

    def phase(self, who: str, name: str, seconds: float) -> None:
        """A part of the cold start is over."""
        if self._is_ready:
            return  # of a restarted replica; the supervisor says when it is back
        self._phases.append((who, name, seconds))
        rate = ""
        if name == "weights" and who in self._loaded:
            rate = f" ({_gigabytes(*self._loaded.pop(who))})"
            if self._progress is not None and who in self._loads:
                self._progress.remove_task(self._loads.pop(who))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, detail=f"{who}: {name} {seconds:.1f} s{rate}")
        else:
            self._say(f"{who}: {name} {seconds:.2f} s{rate}")

    def loading(self, who: str, done_bytes: int, total_bytes: int, seconds: float) -> None:
        """How far the weights are, `seconds` after their loading began."""
        if self._is_ready:
            return
        self._loaded[who] = done_bytes, seconds
        is_late = done_bytes >= total_bytes and who not in self._loads  # over Ray, news may overtake each other
        if self._progress is None or is_late:
            return
        if who not in self._loads:
            self._loads[who] = self._progress.add_task(f"{escape(who)}: weights", total=total_bytes, detail="")
        detail = _gigabytes(done_bytes, seconds, total_bytes)
        self._progress.update(self._loads[who], completed=done_bytes, total=total_bytes, detail=detail)

    def pulling(self, phase: str, done: int, total: int) -> None:
        """Progress of bringing the model into the store; bytes. Called from the pull's thread."""
        if self._progress is None:
            return
        if self._pull is None:
            self._pull = self._progress.add_task("model", total=None, detail="")
        self._progress.update(self._pull, completed=done, total=total or None, detail=phase)
        if total and done >= total and phase == "verify":
            self._progress.update(self._pull, visible=False)

    def log(self, source: str, line: str, level: str = "info") -> None:
        """One line of a child's output, or of the supervisor's own."""
        self._say(f"[dim]{escape(source)} |[/dim] {escape(printable(line))}")

    def ready(self, url: str, seconds: float) -> None:
        """The one ready line, with something to paste."""
        self._is_ready = True
        self._end_progress()
        slowest = sorted(self._phases, key=lambda phase: -phase[2])[:6]
        parts = ", ".join(f"{who} {name} {took:.1f}" for who, name, took in slowest)
        self._say(f"[dim]cold start: {escape(parts)} s[/dim]")
        body = f'{{"model": "{self._model}", "messages": [{{"role": "user", "content": "Say hello."}}]}}'
        self._say(
            f"[bold green]ready[/bold green] {url}/v1 serves {escape(self._model)} after {seconds:.1f} s; try:\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{escape(body)}'",
            self._output,
        )

    def stopping(self) -> None:
        """The first Ctrl-C or SIGTERM arrived."""
        self._end_progress()
        self._say("[dim]stopping; once more to kill[/dim]")

    def failed(self, text: str) -> None:
        """Why it cannot serve, and what to do."""
        self._end_progress()
        self._say(f"[bold red]error:[/bold red] {escape(text)}")

    def close(self) -> None:
        """Print what waits and give the terminal back."""
        self._end_progress()
        with contextlib.suppress(queue.Full):  # nobody reads
            self._lines.put(None, timeout=1.0)
        self._printer.join(1.0)

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, markup: str, console: Console | None = None) -> None:
        try:
            self._lines.put_nowait((console or self._errors, markup))
        except queue.Full:
            self._dropped += 1

    def _print(self) -> None:
        while (item := self._lines.get()) is not None:
            console, markup = item
            if self._dropped:
                markup, self._dropped = f"[dim]({self._dropped} lines dropped)[/dim]\n{markup}", 0
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone; serving goes on
                console.print(markup)


def _gigabytes(done_bytes: int, seconds: float, total_bytes: int | None = None) -> str:
    """ "3.1 of 8.0 GB, 2.4 GB/s"; small models in MB."""
    scale, unit = (1e9, "GB") if (total_bytes or done_bytes) >= 1e9 else (1e6, "MB")
    of_total = "" if total_bytes is None else f" of {total_bytes / scale:.1f}"
    rate = done_bytes / 1e9 / max(seconds, 1e-9)
    return f"{done_bytes / scale:.1f}{of_total} {unit}, {rate:.{1 if rate >= 0.1 else 3}f} GB/s"
