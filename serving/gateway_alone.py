"""`argosy gateway`: a gateway for replicas that somebody else keeps, as its pods on Kubernetes do (C20, C24).

Owns the listening port and keeps one gateway process behind it, which finds the replicas in a directory. When the
secret's file changes, a process that knows the new content takes over: it accepts on the same socket, and the old
one serves its streams to their end. Imports neither torch nor ray nor models.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
from pathlib import Path
from typing import Final

import msgspec

from serving.child import Child, Launch, Log
from serving.config import ServeSettings
from serving.errors import SettingsError
from serving.json_lines import JsonLines
from serving.secret_file import shared_secrets
from serving.supervisor import listen
from serving.terminal import Terminal

MODULE: Final = "serving.gateway"
LOOK_S: Final = 2.0  # between looks at the secret's file
END_MARGIN_S: Final = 4.0  # beyond the drain, for a process to end by itself
MAX_LEAVING: Final = 4  # processes that serve their streams to their end; a secret that changes faster cuts the oldest


class GatewayAlone:
    """One `argosy gateway`."""

    def __init__(
        self, settings: ServeSettings, listener: socket.socket, *, directory_url: str, secret_file: str, log: Log
    ) -> None:
        """settings.drain_timeout_s: how long a gateway that leaves serves its streams. Raises SettingsError."""
        self._settings = settings
        self._listener = listener
        self._directory_url = directory_url
        self._secret_file = secret_file
        self._log = log
        self._secrets = shared_secrets(secret_file)
        self._num_started = 0
        self._current: tuple[Child, asyncio.Task[None]] | None = None
        self._leaving: list[tuple[Child, asyncio.Task[None]]] = []

    @property
    def pids(self) -> list[int]:
        """Of gateway processes, the one that accepts first."""
        every = ([] if self._current is None else [self._current]) + self._leaving
        return [child.pid for child, _ in every if child.pid]

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain. Nothing that was started is left when this returns."""
        try:
            self._start()
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), LOOK_S)
                self._look()
        finally:
            self._listener.close()
            self._retire()
            tasks = [task for _, task in self._leaving]
            if tasks:
                await asyncio.wait(tasks, timeout=self._settings.drain_timeout_s + END_MARGIN_S)
            for child, _ in self._leaving:
                child.kill()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self) -> None:
        child = Child(f"gateway-{self._num_started}", MODULE, log=self._log, on_exit=self._died)
        self._num_started += 1
        launch = self._launch(child.name)
        self._current = child, asyncio.create_task(child.keep(lambda: launch))

    def _launch(self, name: str) -> Launch:
        fd = self._listener.fileno()
        gateway = dataclasses.replace(
            self._settings.gateway,
            fd=fd,
            directory_url=self._directory_url,
            secret=",".join(secret.hex() for secret in self._secrets),
            name=f"{socket.gethostname()}-{name}",
            cache_dir=str(Path(self._settings.store) / ".assets"),
            can_wake=self._settings.min_replicas == 0,
            drain_s=self._settings.drain_timeout_s,
            log_format=self._settings.log_format,
        )
        return Launch(msgspec.json.encode(gateway).decode(), fds=(fd,))

    def _look(self) -> None:
        """A changed secret gets a process that knows it. An unreadable one changes nothing: what runs goes on."""
        try:
            found = shared_secrets(self._secret_file)
        except SettingsError as error:
            self._log("supervisor", str(error))
            return
        self._leaving = [(child, task) for child, task in self._leaving if not task.done()]
        if found != self._secrets:
            self._secrets = found
            self._log("supervisor", "the engine secret has changed; a new gateway process takes over")
            self._retire()
            self._start()

    def _retire(self) -> None:
        if self._current is None:
            return
        child, task = self._current
        self._current = None
        child.stop()
        if not child.pid:
            task.cancel()  # between two starts
        self._leaving.append((child, task))
        while len(self._leaving) > MAX_LEAVING:
            self._leaving.pop(0)[0].kill()

    def _died(self, code: int, failures: int) -> None:
        how = f"exited with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        self._log("supervisor", f"the gateway {how}; restarting ({failures} early deaths in a row)")


def serve(settings: ServeSettings, directory_url: str, secret_file: str) -> int:
    """Serve until a signal; a second one does not wait. Returns the exit code: 0 after a clean stop, 2 refused."""
    view = (JsonLines if settings.log_format == "json" else Terminal)(settings.served_model_name)

    async def run(listener: socket.socket) -> None:
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(130)  # the leash kills every child
            view.stopping()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)
        alone = GatewayAlone(settings, listener, directory_url=directory_url, secret_file=secret_file, log=view.log)
        host, port = listener.getsockname()[:2]
        view.log("supervisor", f"listening on {host}:{port}, replicas are told by {directory_url}")
        await alone.run(stop)

    try:
        asyncio.run(run(listen(settings.host, settings.port)))
    except SettingsError as error:
        view.failed(str(error))
        return 2
    finally:
        view.close()
    return 0
