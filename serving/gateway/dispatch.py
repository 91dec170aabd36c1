"""The gateway's data plane: placement with real sockets, discovery and the model's files around it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from serving.config import GatewaySettings
from serving.errors import NoCapacity, SettingsError
from serving.gateway.assets import Assets
from serving.gateway.connection import Connection, dial
from serving.gateway.demand import Demand
from serving.gateway.fleet import Replica
from serving.gateway.link import Link
from serving.gateway.membership import Membership
from serving.gateway.placement import TICK_S, Counts, Placement
from serving.gateway.streams import Choice, Request
from serving.gateway.view import view_of
from serving.metrics.snapshot import PlaneView
from serving.types import ModelCard

logger = logging.getLogger("argosy.gateway")

PREFETCH_RETRY_S = 1.0


class Dispatch:
    """What one gateway process knows of engines. Implements `streams.Dispatcher`."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Raises SettingsError when the secret is not hexadecimal."""
        self._settings = settings
        try:
            self._secrets = tuple(bytes.fromhex(secret) for secret in settings.secret.split(","))
        except ValueError:
            raise SettingsError("the engine secret must be hexadecimal") from None
        self._clock = clock
        self._placement = Placement(
            max_queue_len=settings.max_queue_len,
            queue_timeout_s=settings.queue_timeout_s,
            clock=clock,
            jitter=jitter,
        )
        self._fleet = self._placement.fleet
        self.demand = Demand(settings, clock=clock)
        self._placement.ready_in_s = self.demand.retry_after_s
        self._assets = Assets(settings.cache_dir, self._fleet.links)
        self._membership = Membership(self._fleet, self._dial, self._opened, clock)
        self._prefetching: set[str] = set()  # fingerprints
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to connect; does not wait for a replica. Raises SettingsError for a bad endpoint."""
        self._membership.start(self._settings.replicas, self._settings.directory_url)
        self._spawn(self._tick_for_ever())
        if self._settings.directory_url is not None:
            reports = self.demand.report_for_ever(
                self._settings.directory_url, self._secrets[0], self._placement.waiting
            )
            self._spawn(reports)

    async def close(self) -> None:
        """Fails what is unfinished, ends all links and tasks. Idempotent."""
        self._placement.close()
        await self._membership.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._assets.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._placement.tick()
            except Exception:  # detection and expiry outlive any one fault
                logger.exception("tick")

    async def _dial(self, replica: Replica) -> tuple[Connection, Link]:
        return await dial(
            replica.endpoint,
            secrets=self._secrets,
            gateway=self._settings.name,
            owner=self._placement,
            clock=self._clock,
            is_draining=replica.is_draining,
        )

    def _opened(self, link: Link) -> None:
        self._placement.opened(link)
        if link.card.fingerprint not in self._prefetching and self._assets.missing(link.card):
            self._prefetching.add(link.card.fingerprint)
            self._spawn(self._prefetch(link.card))

    async def _prefetch(self, card: ModelCard) -> None:
        """All files of the card, so that `is_ready` may say yes; tried again while a replica is there."""
        try:
            while self._fleet.links(card.fingerprint) and (missing := self._assets.missing(card)):
                try:
                    await self._assets.path(card, missing[0])
                except (NoCapacity, OSError) as error:
                    logger.warning("asset %s of %s: %s", missing[0], card.model, error)
                    await asyncio.sleep(PREFETCH_RETRY_S)
        finally:
            self._prefetching.discard(card.fingerprint)

    # --- the API layer's side ---------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """See `Placement.submit`."""
        self._placement.submit(request)

    def cancel(self, choice: Choice) -> None:
        """See `Dispatcher.cancel`."""
        self._placement.cancel(choice)

    def queue_position(self, request: Request) -> tuple[int, float] | None:
        """See `Placement.queue_position`."""
        return self._placement.queue_position(request)

    def card(self, model: str) -> ModelCard | None:
        """See `Dispatcher.card`."""
        return self._fleet.card(model)

    def cards(self) -> list[ModelCard]:
        """Cards of the served models, one per name."""
        return self._fleet.cards()

    async def asset(self, card: ModelCard, name: str) -> Path:
        """A file of the card.

        Raises FileNotFoundError when it has none of that name, NoCapacity when no replica delivered it
        in time.
        """
        return await self._assets.path(card, name)

    def progress(self) -> list[dict[str, Any]]:
        """Replicas as `/progressz` shows them."""
        return self._fleet.progress(self._clock())

    def view(self) -> PlaneView:
        """What /metrics shows of replicas, queues and faults."""
        return view_of(self._placement, self._clock())

    def is_ready(self) -> tuple[bool, str]:
        """Whether a completion would be served now, else the cause."""
        if self._placement.is_closed:
            return False, "the gateway is shutting down"
        links = list(self._fleet.all_links())
        if self.demand.can_wake and not any(link.state == "ready" for link in links):
            return True, ""  # it would wait in the queue for the replica that it starts
        if not links:
            known = list(self._fleet.replicas.values())
            return False, f"no replica is connected, {len(known)} known" + (f": {known[0].error}" if known else "")
        now = self._clock()
        fresh = [link for link in links if self._fleet.is_fresh(link, now)]
        if not fresh:
            return False, "no replica is ready: " + ", ".join(sorted({link.state for link in links}))
        missing = [self._assets.missing(link.card) for link in fresh]
        if all(missing):
            return False, f"waiting for {missing[0][0]} of model {fresh[0].card.model}"
        return True, ""

    @property
    def counts(self) -> Counts:
        """What happened since the start."""
        return self._placement.counts

    @property
    def num_unfinished(self) -> int:
        """Choices in queues and on links."""
        return self._placement.num_unfinished

    def num_queued(self) -> dict[str, int]:
        """Waiting choices by fingerprint."""
        return self._placement.num_queued()
