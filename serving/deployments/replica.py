"""A replica as a Ray Serve deployment: the engine's front, told of by the directory (C19, C20).

Serve places, checks and stops it. No token passes through here: gateways talk to the engine's own
socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import secrets
import time
from typing import Any, Final

import msgspec
from ray import serve
from ray.util import get_current_placement_group, get_node_ip_address

from serving.deployments.directory import NEWS_S, RENEW_S
from serving.deployments.document import DIRECTORY_APP, DIRECTORY_DEPLOYMENT, ReplicaArguments
from serving.deployments.placement import num_ranks
from serving.deployments.ranks import RankActors
from serving.errors import ModelLoadError, SettingsError
from serving.secret_file import shared_secrets

logger = logging.getLogger("ray.serve")

CALL_TIMEOUT_S: Final = 2.0
DEMAND_PAUSE_S: Final = 0.2
"""Between two questions for the demand, which the directory holds until there are news or a second has passed."""


class Replica:
    """One replica. Serve counts no request of it and sees it as idle: drain and health are ours."""

    async def __init__(self, arguments: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._arguments = msgspec.convert(arguments, ReplicaArguments)
        self._id = serve.get_replica_context().replica_id.unique_id
        # Where gateways on other hosts find it: the directory tells the address that it is bound to.
        self._listen = self._arguments.listen.replace("tcp:node:", f"tcp:{get_node_ip_address()}:")
        self._state = "ready"
        self._server: Any = None
        self._ranks: RankActors | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._demand = (-1, 0, 0.0)  # choices that wait in gateways, tokens, when they were reported; -1 = unknown
        begun = time.monotonic()
        loop = asyncio.get_running_loop()

        def on_phase(name: str, seconds: float) -> None:
            asyncio.run_coroutine_threadsafe(self._tell("report", self._id, name, seconds), loop)

        def on_load(done_bytes: int, total_bytes: int, seconds: float) -> None:
            news = self._tell("report_load", self._id, done_bytes, total_bytes, seconds)
            asyncio.run_coroutine_threadsafe(news, loop)

        try:
            # In a thread: this loop answers Serve's probes while the weights are read.
            self._server = await asyncio.to_thread(self._load, on_phase, on_load)
        except (ModelLoadError, SettingsError, MemoryError, ImportError) as error:
            text = str(error) or "out of memory while loading the model"
            await self._tell("report", self._id, "load", 0.0, text)
            self._kill_ranks()
            raise
        self._start_s = time.monotonic() - begun
        await self._renew_once()
        self._renewal = asyncio.create_task(self._renew())

    def _load(self, on_phase: Any, on_load: Any) -> Any:
        arguments = self._arguments
        if num_ranks(arguments.engine) > 1:
            self._ranks = self._start_ranks()  # first: they import torch while this process does
        module, name = arguments.server.split(":")
        server_class = getattr(importlib.import_module(module), name)
        begun = time.monotonic()
        sockets = []
        if self._ranks is not None:
            sockets = self._ranks.sockets()
            on_phase("ranks", time.monotonic() - begun)
        server = server_class(
            arguments.engine,
            replica_id=self._id,
            secret=shared_secrets(arguments.secret_file)[0],
            listen=self._listen,
            on_phase=on_phase,
            on_load=on_load,
            ranks=sockets,
        )
        server.start()
        return server

    def _start_ranks(self) -> RankActors:
        placement = get_current_placement_group()
        if placement is None:
            raise ModelLoadError("a replica of several ranks has no placement group; deploy it through `serve_config`")
        host = self._listen.split(":")[1]
        # A start has a name of its own: a rank of an earlier one is never taken for one of this.
        gang = f"{self._id}-{secrets.token_hex(8)}"
        return RankActors(placement, gang, host, self._arguments.secret_file)

    def _kill_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.kill()

    async def check_health(self) -> None:
        """Serve kills this replica when it raises: the step loop is the truth, not this loop."""
        healthy, why = self._server.health()
        if not healthy:
            raise RuntimeError(f"replica {self._id} is sick: {why}")

    async def wake(self) -> None:
        """Nothing to do: whoever calls it waits in its handle's queue until a replica runs (see the directory)."""

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks four times a second where replicas are autoscaled, for `serve_policy`. Numbers at hand only."""
        if self._hearing is None:
            self._hearing = asyncio.create_task(self._hear_demand())
        now = time.monotonic()
        choices, tokens, told_s = self._demand
        return {
            **self._server.load(),
            "mark": now,
            "is_ready": float(self._state == "ready"),
            "start_s": self._start_s,
            "demand_choices": max(choices, 0),
            "demand_tokens": tokens,
            "demand_age_s": now - told_s if choices >= 0 else -1.0,
        }

    async def _hear_demand(self) -> None:
        """Keeps what the directory knows of all gateways' queues: one question is always open there."""
        news = -1
        while True:
            await asyncio.sleep(DEMAND_PAUSE_S)
            with contextlib.suppress(Exception):  # what is not heard grows old, and old data change nothing
                handle = serve.get_deployment_handle(DIRECTORY_DEPLOYMENT, DIRECTORY_APP)
                async with asyncio.timeout(NEWS_S + CALL_TIMEOUT_S):
                    told = await handle.demand.remote(self._server.card.model, news)
                news = told["news"]
                self._demand = (told["choices"], told["tokens"], time.monotonic() - told["age_s"])

    async def __del__(self) -> None:
        """Serve's graceful stop (C19a): say so, let the gateways move the rows, go."""
        server = getattr(self, "_server", None)
        if server is None:
            return
        self._state = "draining"
        await self._renew_once()
        await asyncio.to_thread(server.drain, self._arguments.drain_timeout_s)
        for task in (self._renewal, self._hearing):
            if task is not None:
                task.cancel()
        await self._tell("leave", self._id)
        await asyncio.to_thread(server.close)
        self._kill_ranks()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._renew_once()

    async def _renew_once(self) -> None:
        _, host, port = self._server.address.split(":")
        entry = {
            "id": self._id,
            "epoch": self._server.epoch,
            "host": host,
            "port": int(port),
            "card": msgspec.to_builtins(self._server.card),
            "state": self._state,
        }
        await self._tell("renew", entry)

    async def _tell(self, method: str, *arguments: Any) -> None:
        """Call the directory; its silence must never end or delay a replica."""
        try:
            handle = serve.get_deployment_handle(DIRECTORY_DEPLOYMENT, DIRECTORY_APP)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await getattr(handle, method).remote(*arguments)
        except Exception as error:  # Ray raises many kinds; the next renewal comes anyway
            with contextlib.suppress(Exception):
                logger.warning("directory.%s: %s", method, error)
