"""A replica's front: the engine protocol's server around a step loop (C13, C22, C23).

Two threads. The step loop computes. The server's loop owns connections, permits, beats and held
rows; it reads the step loop's counters but never waits for it, so that health is told while a step
runs, hangs or dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from serving import wire
from serving.config import EngineSettings
from serving.engine import address
from serving.engine.assembly import Engine, build_engine
from serving.engine.card import build_card, read_asset
from serving.engine.connection import Connection
from serving.engine.core import EngineCore
from serving.engine.handover import Handover
from serving.engine.held import HeldRows
from serving.engine.output import StepOutput
from serving.engine.permits import Permits
from serving.engine.request import Request
from serving.engine.stats import Start, load_of, stats_of
from serving.engine.translate import asset_pieces, to_request, to_step
from serving.engine.watchdog import disarm, end_if_stalled
from serving.engine.worker import Found, LoadCallback
from serving.errors import ArgosyError, EngineError
from serving.types import ModelCard, RankState

log = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.08
STATS_EVERY = 6  # beats
ORPHAN_GRACE_S = 1.0


class ReplicaServer:
    """One replica. `start` loads the model; from then on gateways may connect."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        replica_id: str,
        secret: bytes,
        listen: str,
        on_phase: Callable[[str, float], None] | None = None,
        on_load: LoadCallback | None = None,
        exits_on_failure: bool = True,
        ranks: Sequence[socket.socket] = (),
    ) -> None:
        """Binds `listen` ("unix:<path>" or "tcp:<host>:<port>[-<port>]") and loads nothing yet.

        exits_on_failure: a failed or stalled step loop ends the process, so that whoever supervises
            it starts a new one.
        ranks: of a gang, connected stream sockets to ranks 1, 2, … (`rank.run_rank` at their other ends).
        Raises SettingsError when the address cannot be bound.
        """
        self.settings = settings
        self.replica_id = replica_id
        self._host = socket.gethostname()
        self.secret = secret
        self.epoch = time.time_ns() & 0x7FFFFFFFFFFF
        self.failure: BaseException | None = None
        self._socket, self.address = address.bind(listen)
        self._start = Start(on_phase, on_load)
        self._exits_on_failure = exits_on_failure
        self._state = "loading"
        self._ranks = ranks
        self._card: ModelCard | None = None
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._connections: dict[int, Connection] = {}
        self._accepted: weakref.WeakSet[Connection] = weakref.WeakSet()  # strangers before the handshake, too
        self._num_connections = 0
        self._permits = Permits(settings.max_num_seqs)
        self._beat_seq = 0
        self._num_finished = 0  # rows
        self._is_closing = False

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the model and open for gateways. Raises ModelLoadError, or OSError when it cannot listen."""
        self._engine = engine = build_engine(
            self.settings,
            self._ranks,
            on_phase=self._start.phase,
            on_load=self._start.load,
            on_output=lambda output: self._post(self._emit, output),
            on_failure=self._fail,
        )
        self._card = build_card(self.settings, engine.worker)
        self._handover = Handover(engine.core, self._post, self._connections, HeldRows())
        self._state = "ready"
        engine.core.start()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(opened,), name="replica-server", daemon=True)
        self._thread.start()
        opened.result()

    def close(self) -> None:
        """End both threads and every connection."""
        self._is_closing = True
        if self._engine is not None:
            self._engine.core.stop()
            if self._engine.gang is not None:
                self._engine.gang.close()
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
        if self._exits_on_failure:
            disarm()
        self._socket.close()
        if self.address.startswith("unix:"):
            address.unlink(self.address)

    def drain(self, timeout_s: float) -> None:
        """Take no new work, say so, and wait until the rows are gone (C19a)."""
        self._state = "draining"
        deadline = time.monotonic() + timeout_s
        while self._num_outstanding() > 0 and time.monotonic() < deadline:
            time.sleep(0.05)

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "the replica has not been started"
        return self._card

    @property
    def found(self) -> Found:
        assert self._engine is not None, "the replica has not been started"
        return self._engine.worker.found

    @property
    def core(self) -> EngineCore:
        assert self._engine is not None, "the replica has not been started"
        return self._engine.core

    def health(self) -> tuple[bool, str]:
        """Whether the step loop makes progress, and if not, why (C13). Any thread may ask."""
        if self.failure is not None:
            return False, f"the replica failed: {type(self.failure).__name__}: {self.failure}"
        if self._engine is None:
            return True, "loading"
        age_s, core = self.core.step_age_s, self.core
        if age_s > core.limit_s:
            return False, f"the running step is {age_s:.1f} s old, announced were {core.announced_s:.3f} s"
        return True, self._state

    def load(self) -> dict[str, float]:
        """What an autoscaler needs, at hand: no wait, no arithmetic. Any thread may ask; only after `start`."""
        return load_of(self.core, self.card, self._num_finished)

    def progress(self) -> list[RankState]:
        """Every rank of the gang."""
        core = self.core
        own = RankState(rank=0, host=self._host, pid=os.getpid(), step=core.num_steps, age_s=core.step_age_s)
        gang = self._engine.gang if self._engine is not None else None
        return [own, *(gang.states() if gang is not None else ())]

    # --- the server's loop ----------------------------------------------------------------------

    def _serve(self, opened: Future[None]) -> None:
        with asyncio.Runner() as runner:
            self._loop = loop = runner.get_loop()
            try:
                server = runner.run(self._open())
            except OSError as error:
                opened.set_exception(error)
                return
            beats = loop.create_task(self._forever(self._beat, BEAT_INTERVAL_S))
            opened.set_result(None)
            loop.run_forever()
            beats.cancel()
            runner.run(self._shut(server))

    async def _shut(self, server: asyncio.Server) -> None:
        # A connection that is being accepted while its server closes would keep its socket for ever
        # (asyncio's `_attach` asserts an open server): no new ones, then those, then the server.
        asyncio.get_running_loop().remove_reader(self._socket)
        await asyncio.sleep(0.01)
        server.close()
        self._close_connections()
        await asyncio.sleep(0.01)

    async def _open(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()

        def connect() -> Connection:
            self._num_connections += 1
            connection = Connection(self, self._num_connections)
            self._accepted.add(connection)
            return connection

        if self._socket.family == socket.AF_UNIX:
            return await loop.create_unix_server(connect, sock=self._socket)
        return await loop.create_server(connect, sock=self._socket)

    async def _forever(self, function: Callable[[], None], interval_s: float) -> None:
        while True:
            self._guarded(function)
            await asyncio.sleep(interval_s)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """Run in the server's loop; called by other threads."""
        if self._loop is not None and not self._is_closing:
            self._loop.call_soon_threadsafe(self._guarded, function, *args)

    def _guarded(self, function: Callable[..., None], *args: Any) -> None:
        """A beat or an output that is lost to an error ends the replica: half of one must not live on."""
        try:
            function(*args)
        except Exception as failure:
            self._fail(failure)

    # --- connections ----------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        self._connections[connection.number] = connection
        self._send_beat(connection, has_stats=True)

    def closed(self, connection: Connection) -> None:
        """Its rows have nobody to write to: keyed ones are held, the others end after a grace."""
        del self._connections[connection.number]
        orphans = []
        for handle, submit in connection.live.items():
            key = (connection.number, handle)
            if submit.is_keyed:
                self._handover.orphan(key)
            else:
                orphans.append(key)
        if orphans and self._loop is not None:
            self._loop.call_later(ORPHAN_GRACE_S, self._cancel_keys, orphans)

    def received(self, connection: Connection, message: wire.FromGateway) -> None:
        if isinstance(message, wire.Submit):
            self._submit(connection, message)
        elif isinstance(message, wire.Cancel):
            for handle in message.handles:
                connection.live.pop(handle, None)
                self._handover.forget((connection.number, handle))
            self._cancel_keys([(connection.number, handle) for handle in message.handles])
        elif isinstance(message, wire.Find):
            self._handover.find(connection, message)
        elif isinstance(message, wire.AssetRequest):
            self._send_asset(connection, message.name)
        else:
            raise wire.WireError(f"{type(message).__name__} after the handshake")

    def _submit(self, connection: Connection, submit: wire.Submit) -> None:
        connection.num_submitted += 1
        if connection.num_submitted > connection.granted:
            connection.send(wire.Reject(submit.handle, "not_granted", "more submits than permits"))
            return
        if self._state != "ready":
            connection.send(wire.Reject(submit.handle, "draining", "the replica takes no new work"))
            return
        if self._permits.is_overfull(self._num_outstanding()):
            connection.send(wire.Reject(submit.handle, "overfull", "too many rows wait already"))
            return
        if submit.handle in connection.live:
            raise wire.WireError(f"handle {submit.handle} is in use")
        hashes_blocks = self.settings.enable_prefix_cache
        try:
            request = to_request(submit, connection.number, self.card, hashes_blocks=hashes_blocks)
        except ArgosyError as error:
            self._reject(connection, submit.handle, error)
            return
        connection.live[submit.handle] = submit
        self._handover.submitted(request.key, submit)
        self.core.call(lambda: self._add(connection, request))

    def _add(self, connection: Connection, request: Request) -> None:
        """In the step loop's thread."""
        try:
            self.core.scheduler.add(request)
        except ArgosyError as error:
            self._post(self._reject, connection, request.key[1], error)

    def _reject(self, connection: Connection, handle: int, error: ArgosyError) -> None:
        connection.live.pop(handle, None)
        self._handover.forget((connection.number, handle))
        connection.send(wire.Reject(handle, error.error_code, error.message, error.param))

    def _cancel_keys(self, keys: list[tuple[int, int]]) -> None:
        def cancel() -> None:
            for key in keys:
                self.core.scheduler.cancel(key)

        self.core.call(cancel)

    def _send_asset(self, connection: Connection, name: str) -> None:
        if name not in self.card.assets:
            raise wire.WireError("an asset that the card does not name")
        data = read_asset(self.settings.model_dir, name)
        connection.send_behind(asset_pieces(name, self.card.assets[name], data))

    # --- outputs --------------------------------------------------------------------------------

    def _emit(self, output: StepOutput) -> None:
        """One frame per connection that this step concerns."""
        self._num_finished += len(output.finished)
        concerned = set(output.connections.tolist())
        concerned.update(connection for connection, *_ in output.finished)
        concerned.update(connection for connection, *_ in output.admitted)
        concerned.update(connection for connection, _ in output.failed)
        concerned.update(connection for connection, *_ in output.notes)
        for number in concerned:
            connection = self._connections.get(number)
            if connection is not None:
                self._send_step(connection, output)
        self._handover.keep(output)
        if output.finished or output.failed:
            for connection in self._connections.values():
                self._grant(connection)

    def _send_step(self, connection: Connection, output: StepOutput) -> None:
        for owner, handle, *_ in output.finished:
            if owner == connection.number:
                connection.live.pop(handle, None)
        self._grant(connection)
        connection.send(to_step(output, connection.number, connection.granted))
        for owner, handle in output.failed:
            if owner == connection.number:
                fault = EngineError("The model computed NaN or infinity.", code="engine_fault")
                self._reject(connection, handle, fault)

    # --- permits and beats ----------------------------------------------------------------------

    def _num_outstanding(self) -> int:
        """Rows here: those that a connection reads, or those that the scheduler still has (orphans)."""
        scheduler = self.core.scheduler
        num_live = sum(len(connection.live) for connection in list(self._connections.values()))
        return max(num_live, scheduler.num_running + scheduler.num_waiting)

    def _grant(self, connection: Connection) -> None:
        """Let the connection submit up to its share of what is free; never take a permit back."""
        if self._state != "ready":
            return
        share = self._permits.share(self._num_outstanding(), len(self._connections))
        connection.granted = max(connection.granted, connection.num_submitted + share)

    def _beat(self) -> None:
        core = self.core
        self._beat_seq += 1
        if self._exits_on_failure:
            end_if_stalled(core.step_age_s)
        for connection in list(self._connections.values()):
            self._send_beat(connection, has_stats=self._beat_seq % STATS_EVERY == 0)
        self._handover.expire()

    def _send_beat(self, connection: Connection, has_stats: bool) -> None:
        core, pool = self.core, self.core.scheduler.pool
        self._grant(connection)
        connection.send_ahead(
            wire.Beat(
                seq=self._beat_seq,
                state=self._state,
                step=core.num_steps,
                step_age_s=core.step_age_s,
                announced_s=core.announced_s,
                num_running=core.scheduler.num_running,
                num_waiting=core.scheduler.num_waiting,
                blocks_used=pool.num_owned,
                blocks_total=pool.num_blocks - 1,
                granted=connection.granted,
                ranks=self.progress(),
                tokens_per_s=core.tokens_per_s,
                stats=stats_of(self._engine, self._start) if has_stats and self._engine is not None else None,
            )
        )

    # --- failure --------------------------------------------------------------------------------

    def _fail(self, failure: BaseException) -> None:
        """In the thread that learns it: it is over. Closed connections tell the gateways at once."""
        self.failure = self.failure or failure
        log.critical("the replica failed", exc_info=failure)
        if self._exits_on_failure:
            os._exit(70)
        self._post(self._close_connections)

    def _close_connections(self) -> None:
        for connection in list(self._accepted):
            connection.close()
