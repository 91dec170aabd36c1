"""From settings to a running service: the port, the model, the supervisor, the exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from serving import found, logs
from serving.config import ServeSettings
from serving.errors import SettingsError
from serving.found import Found
from serving.json_lines import JsonLines
from serving.supervisor import StartFailed, Supervisor, listen
from serving.terminal import Terminal


def serve(settings: ServeSettings, facts: Found) -> int:
    """Serve until a signal. Returns the exit code: 0 after a clean stop, 2 refused, 1 failed."""
    try:
        listener = listen(settings.host, settings.port)  # before anything slow: a taken port fails at once
    except SettingsError as error:
        refusal = f"error: {error}"
        if settings.log_format == "json":
            refusal = logs.encoded("error", "supervisor", "argosy.supervisor", str(error), {"event": "failed"})
        print(refusal, file=sys.stderr)
        return 2
    terminal = (JsonLines if settings.log_format == "json" else Terminal)(settings.served_model_name)

    def find_model() -> Path:
        from models.store import pull

        folder = pull(
            settings.model,
            store=Path(settings.store),
            quantization=settings.engine.quantization,
            progress=terminal.pulling,
        )
        found.check_model(folder, settings, facts)
        return folder

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(130)  # the leash kills every child
            terminal.stopping()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        supervisor = Supervisor(settings, facts, listener=listener, find_model=find_model, view=terminal)
        await supervisor.run(stop)

    from models.store import StoreError

    try:
        asyncio.run(run())
    except (SettingsError, StoreError) as error:
        terminal.failed(str(error))
        return 2
    except StartFailed as error:
        terminal.failed(str(error))
        return 1
    finally:
        terminal.close()
    return 0


def pull(settings: ServeSettings) -> int:
    """`argosy pull`. Returns the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from models.store import StoreError
    from models.store import pull as bring

    console = Console(stderr=True)
    try:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task(settings.model, total=None)
            folder = bring(
                settings.model,
                store=Path(settings.store),
                quantization=settings.engine.quantization,
                progress=lambda phase, done, total: progress.update(
                    task, description=phase, completed=done, total=total or None
                ),
            )
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0
