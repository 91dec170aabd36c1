"""Owns the listening port and keeps the gateway and the replicas' runtime alive (C24).

The supervisor imports neither torch nor ray: it binds, starts children, restarts them and stops
them. Whatever fails below it, connections find the same listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from serving import control
from serving.child import Child, Launch
from serving.config import ServeSettings, expanded
from serving.errors import SettingsError
from serving.found import Found
from serving.run_folder import RunFolder

BACKLOG: Final = 4096
STOP_S: Final = 4.0
MAX_EARLY_DEATHS: Final = 3
PATIENCE_S: Final = 5.0  # before a start that hangs is explained
_RUNTIME_MODULES: Final = {"ray": "serving.deployments.cluster", "local": "serving.local"}


class View(Protocol):
    """Where the supervisor's news go: a terminal, or a test."""

    def phase(self, who: str, name: str, seconds: float) -> None:
        """A part of the cold start is over."""

    def loading(self, who: str, done_bytes: int, total_bytes: int, seconds: float) -> None:
        """How far the weights are, `seconds` after their loading began."""

    def log(self, source: str, line: str, level: str = "info") -> None:
        """One line of a child's output, or of the supervisor's own. level: info | warning | error."""

    def ready(self, url: str, seconds: float) -> None:
        """A completion would be served now, `seconds` after the start."""


class StartFailed(Exception):
    """The service cannot start; the text says what to do."""


FindModel = Callable[[], Path]
"""Brings the model into the store; may take minutes. Runs in a thread."""


def listen(host: str, port: int) -> socket.socket:
    """The one listening socket. Raises SettingsError when the address cannot be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise SettingsError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except PermissionError:
        listener.close()
        raise SettingsError(f"--port {port}: only root may listen below 1024; choose another with --port") from None
    except OSError as error:
        listener.close()
        if error.errno == 98:
            raise SettingsError(
                f"port {port} on {host} is taken by another process; stop it or choose another with --port"
            ) from None
        raise SettingsError(f"--host {host}, --port {port}: {error.strerror}") from None
    listener.listen(BACKLOG)
    return listener


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


class Supervisor:
    """One `argosy serve`.

    find_model and check_model run in a thread while the runtime starts; the latter refuses a model
    that cannot work here. The modules and `server` are replaced by tests.
    """

    def __init__(
        self,
        settings: ServeSettings,
        facts: Found,
        *,
        listener: socket.socket,
        find_model: FindModel,
        view: View,
        gateway_module: str = "serving.gateway",
        runtime_module: str | None = None,
        server: str = control.DEFAULT_SERVER,
    ) -> None:
        self._settings = settings
        self._facts = facts
        self._listener = listener
        self._find_model = find_model
        self._view = view
        self._server = server
        self._begun = time.monotonic()
        self.url = _url_of(listener)
        self._folder = RunFolder()
        self._directory_port = free_port() if settings.runtime == "ray" else 0
        self.gateway = Child("gateway-0", gateway_module, log=view.log, on_exit=self._gateway_died)
        self.runtime = Child(
            settings.runtime,
            runtime_module or _RUNTIME_MODULES[settings.runtime],
            log=view.log,
            on_exit=self._runtime_died,
            # Ray must be shut down by its driver: a killed one leaves agents that wait a day for GCS.
            orphan_signal=signal.SIGTERM if settings.runtime == "ray" else signal.SIGKILL,
        )
        self._order: control.Deploy | None = None
        self._runtime_end: asyncio.StreamWriter | None = None
        self._conversation: asyncio.Task[None] | None = None
        self._replicas_ready = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_ready = False

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set.

        Raises StartFailed, or what find_model raises, when the service cannot start. Nothing that
        was started is left when this returns.
        """
        keepers = [
            asyncio.create_task(self.runtime.keep(self._launch_runtime)),
            asyncio.create_task(self.gateway.keep(self._launch_gateway)),
        ]
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(_wait(stop))
        watched = [*keepers, serving, stopping, self._failure]
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            serving.cancel()
            stopping.cancel()
            await self._stop(keepers)
            await asyncio.gather(serving, stopping, return_exceptions=True)

    async def _serve(self) -> None:
        """From nothing to the ready line; then only waits."""
        begun = time.monotonic()
        model_dir = await _in_thread(self._find_model)
        self._view.phase("model", "pull and verify", time.monotonic() - begun)
        engine = dataclasses.replace(
            self._settings.engine,
            model_dir=str(model_dir),
            num_threads=self._facts.num_threads,
            weight_cache_dir=_weight_cache_dir(self._settings),
        )
        self._order = control.Deploy(engine, self._settings.replicas, _scaling(self._settings))
        self._send_order()
        await self._replicas_ready.wait()
        begun = told = time.monotonic()
        while cause := await self._why_not_serving():
            if time.monotonic() - told > PATIENCE_S:
                told = time.monotonic()
                self._view.log("supervisor", f"the replicas are ready, the gateway is not yet: {cause}", "warning")
            await asyncio.sleep(0.05)
        self._view.phase("gateway", "first contact", time.monotonic() - begun)
        self._is_ready = True
        self._view.ready(self.url, time.monotonic() - self._begun)
        await asyncio.Event().wait()

    async def _why_not_serving(self) -> str:
        """What keeps the gateway from serving a completion now; "" when nothing does."""
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        try:
            async with asyncio.timeout(2.0):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    head, _, body = (await reader.read(1 << 14)).partition(b"\r\n\r\n")
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            return str(error) or "no answer within 2 s"
        if head.split(b" ")[1:2] == [b"200"]:
            return ""
        return body.decode(errors="replace")[:500] or "no cause given"

    # --- the gateway ------------------------------------------------------------------------------

    def _launch_gateway(self) -> Launch:
        settings = self._settings
        is_local = settings.runtime == "local"
        gateway = dataclasses.replace(
            settings.gateway,
            fd=self._listener.fileno(),
            replicas=tuple(control.local_address(self._folder.path, i) for i in range(settings.replicas))
            if is_local
            else (),
            directory_url=None if is_local else f"http://127.0.0.1:{self._directory_port}/directory",
            secret=self._folder.secret.hex(),
            cache_dir=str(Path(settings.store) / ".assets"),
            can_wake=settings.min_replicas == 0,
            log_format=settings.log_format,
        )
        return Launch(msgspec.json.encode(gateway).decode(), fds=(self._listener.fileno(),))

    def _gateway_died(self, code: int, failures: int) -> None:
        self._report_death("the gateway", code, failures)

    # --- the runtime ------------------------------------------------------------------------------

    def _launch_runtime(self) -> Launch:
        ours, theirs = socket.socketpair()
        self._conversation = asyncio.create_task(self._converse(ours))
        self._conversation.add_done_callback(lambda _: ours.close())  # also when it never began
        runtime = control.RuntimeSettings(
            run_dir=str(self._folder.path),
            secret_file=str(self._folder.secret_file),
            replicas=self._settings.replicas,
            cores=self._facts.cores,
            drain_timeout_s=self._settings.drain_timeout_s,
            control_fd=theirs.fileno(),
            log_format=self._settings.log_format,
            directory_port=self._directory_port,
            server=self._server,
        )
        return Launch(msgspec.json.encode(runtime).decode(), given=theirs)

    async def _converse(self, end: socket.socket) -> None:
        """Give the order to this start of the runtime and hear its events until it is gone."""
        reader, writer = await asyncio.open_connection(sock=end, limit=control.MAX_LINE_BYTES)
        self._runtime_end = writer
        self._send_order()
        try:
            while line := await reader.readline():
                self._hear(control.decode_event(line))
        except ConnectionResetError:
            return
        finally:
            writer.close()

    def _send_order(self) -> None:
        if self._order is not None and self._runtime_end is not None:
            self._runtime_end.write(control.encode_line(self._order))

    def _hear(self, event: control.Event) -> None:
        match event:
            case control.Phase(who, name, seconds):
                self._view.phase(who, name, seconds)
            case control.Loading(who, done_bytes, total_bytes, seconds):
                self._view.loading(who, done_bytes, total_bytes, seconds)
            case control.Ready():
                self._replicas_ready.set()
                if self._is_ready:
                    self._view.log("supervisor", "every replica is ready again")
            case control.Note(text):
                self._view.log("supervisor", text, "warning")
            case control.Failed(text):
                if self._is_ready:
                    self._view.log("supervisor", text, "error")
                else:
                    self._fail(text)

    def _runtime_died(self, code: int, failures: int) -> None:
        self._report_death(f"the {self._settings.runtime} runtime", code, failures)

    # --- ends -------------------------------------------------------------------------------------

    def _report_death(self, what: str, code: int, failures: int) -> None:
        how = f"exited with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        self._view.log("supervisor", f"{what} {how}; restarting", "warning")
        if not self._is_ready and failures >= MAX_EARLY_DEATHS:
            self._fail(f"{what} ended {failures} times while starting; its last words are above")

    def _fail(self, text: str) -> None:
        if not self._failure.done():
            self._failure.set_exception(StartFailed(text))

    async def _stop(self, keepers: list[asyncio.Task[None]]) -> None:
        """Ask, wait, kill: nothing survives, and it takes STOP_S at most and a little."""
        self._listener.close()
        self.gateway.stop()
        # The end of the conversation tells the runtime too, and Ray prints a trace on SIGTERM.
        self.runtime.stop(ask=self._settings.runtime != "ray")
        if self._runtime_end is not None:
            self._runtime_end.close()
        for child, keeper in zip((self.runtime, self.gateway), keepers, strict=True):
            if not child.pid:
                keeper.cancel()
        _, pending = await asyncio.wait(keepers, timeout=STOP_S)
        if pending:
            self.gateway.kill()
            self.runtime.kill()
        await asyncio.gather(*keepers, return_exceptions=True)
        if self._conversation is not None:
            self._conversation.cancel()
            await asyncio.gather(self._conversation, return_exceptions=True)
        if self._failure.done():
            self._failure.exception()  # looked at, also when something else ended the run
        self._folder.remove()


def _scaling(settings: ServeSettings) -> control.Scaling | None:
    if settings.min_replicas is None:
        return None
    return control.Scaling(
        min_replicas=settings.min_replicas,
        max_queue_delay_s=settings.max_queue_delay_s,
        scale_in_window_s=settings.scale_in_window_s,
        scale_to_zero_after_s=settings.scale_to_zero_after_s,
    )


def _weight_cache_dir(settings: ServeSettings) -> str:
    """Unless asked for, only what is rounded while it loads is kept: the rest packs as fast as a disk reads it."""
    if settings.weight_cache:
        return "" if settings.weight_cache == "off" else str(expanded(settings.weight_cache).absolute())
    return str(Path(settings.store) / ".packed") if settings.engine.quantization in ("int8", "int4") else ""


async def _in_thread(function: Callable[[], Path]) -> Path:
    """What the function returns or raises. Unlike asyncio.to_thread, a stop does not wait for it: a
    pull may take minutes, and one that is cut off is made again."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Path] = loop.create_future()

    def settle(value: Path | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        elif value is not None:
            result.set_result(value)

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name="pull", daemon=True).start()
    return await result


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
