"""Which replicas exist, and one connection to each, for ever (C20)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from serving.errors import SettingsError
from serving.gateway.connection import Connection, parse_endpoint
from serving.gateway.fleet import Fleet, Replica
from serving.gateway.link import Cause, Link

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("argosy.gateway")

MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
MAX_START_BACKOFF_S = 0.25
MAX_LOCAL_BACKOFF_S = 0.25  # a dial on this host costs nothing, and streams may be waiting for its replica
"""… of the directory until it has answered for the first time: everybody waits for that."""
QUIET_S = 10.0
"""While a service starts, its parts do not find each other yet: failures of this time are no news."""
MIN_QUARANTINE_S = 5.0
MAX_QUARANTINE_S = 300.0
STEADY_S = 10.0
"""A link that lived this long was a good one: past faults no longer count."""
MAX_FAILED_DIALS = 3
MAX_LISTING_BYTES = 4 << 20
MAX_REPLICAS = 4096
POLL_TIMEOUT_S = 65.0

Dial = Callable[[Replica], Awaitable[tuple[Connection, Link]]]


class Backoff:
    """Waiting times between attempts: doubling, bounded."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._next_s = least_s

    def reset(self) -> None:
        self._next_s = self._least_s

    def next_s(self) -> float:
        wait_s = self._next_s
        self._next_s = min(wait_s * 2, self._most_s)
        return wait_s


class Complaint:
    """Log lines about one peer that does not answer. All attempts fail alike: only a change is worth a line."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quiet_until = clock() + QUIET_S
        self._said = ""

    def settle(self) -> None:
        """The peer has answered: from now on its silence is news at once."""
        self._quiet_until = self._clock()
        self._said = ""

    def say(self, peer: str, text: str) -> None:
        if text == self._said:
            return
        if self._clock() < self._quiet_until:
            logger.debug("%s: %s", peer, text)
        else:
            self._said = text
            logger.warning("%s: %s", peer, text)


class Entry(msgspec.Struct, kw_only=True):
    """A replica in the directory's listing; further fields are its own business."""

    host: str
    port: int
    id: str = ""
    state: str = "ready"


class Listing(msgspec.Struct, kw_only=True):
    version: int
    replicas: list[Entry]


class Membership:
    """Keeps the fleet's endpoints equal to what is listed and dials every one of them again and again.

    Forgetting is not death: a replica that is no longer listed leaves only after `MAX_FAILED_DIALS`
    dials in a row have failed. Silence of the directory changes nothing.
    """

    def __init__(self, fleet: Fleet, dial: Dial, on_open: Callable[[Link], None], clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._dial = dial
        self._on_open = on_open
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, endpoints: tuple[str, ...], directory_url: str | None) -> None:
        """Raises SettingsError for an endpoint that cannot be parsed."""
        for endpoint in endpoints:
            parse_endpoint(endpoint)
        for endpoint in endpoints:
            self._add(endpoint)
        if directory_url is not None:
            self._tasks["directory"] = asyncio.create_task(self._follow(directory_url))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def _add(self, endpoint: str) -> Replica:
        replica = self._fleet.replicas.get(endpoint)
        if replica is None:
            replica = self._fleet.replicas[endpoint] = Replica(endpoint)
            self._tasks[endpoint] = asyncio.create_task(self._keep(replica))
        return replica

    # --- one endpoint -----------------------------------------------------------------------------

    async def _keep(self, replica: Replica) -> None:
        is_local = replica.endpoint.startswith("unix:")
        backoff = Backoff(MIN_BACKOFF_S, MAX_LOCAL_BACKOFF_S if is_local else MAX_BACKOFF_S)
        quarantine = Backoff(MIN_QUARANTINE_S, MAX_QUARANTINE_S)
        complaint = Complaint(self._clock)
        num_failed = 0
        while replica.is_listed or num_failed < MAX_FAILED_DIALS:
            try:
                connection, link = await self._dial(replica)
            except Exception as error:  # whatever it was: a replica that is never dialled again is lost
                num_failed += 1
                replica.error = _cause(error)
                complaint.say(f"replica {replica.id or replica.endpoint}", replica.error)
                await asyncio.sleep(backoff.next_s())
                continue
            num_failed = 0
            complaint.settle()
            replica.id, replica.epoch, replica.error, replica.link = link.replica, link.epoch, "", link
            logger.info("replica %s: connected, epoch %d", link.replica, link.epoch)
            try:
                self._on_open(link)
                await connection.lost.wait()
            finally:
                replica.link = None
                link.end(Cause.CLOSED)
            replica.error = f"connection {link.cause}"
            if self._clock() - link.opened_at > STEADY_S:
                quarantine.reset()
            if link.cause is Cause.FAULTY:
                await asyncio.sleep(quarantine.next_s())
                continue
            if link.pulse.last_beat is not None:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())
        logger.info("replica %s: dropped, neither listed nor reachable", replica.id or replica.endpoint)
        del self._fleet.replicas[replica.endpoint]
        del self._tasks[replica.endpoint]

    # --- the directory ----------------------------------------------------------------------------

    async def _follow(self, url: str) -> None:
        import httpx

        backoff = Backoff(MIN_BACKOFF_S, MAX_START_BACKOFF_S)
        complaint = Complaint(self._clock)
        is_known = False
        version = -1
        timeout = httpx.Timeout(POLL_TIMEOUT_S, connect=2.0)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            while True:
                try:
                    listing = await _poll(client, url, version)
                    self.take(listing)
                except Exception as error:  # whatever it was: without this task no replica is ever found again
                    complaint.say("directory", str(error) or type(error).__name__)
                    version = -1
                    await asyncio.sleep(backoff.next_s())
                    continue
                if not is_known:
                    is_known = True
                    backoff = Backoff(MIN_BACKOFF_S, 2 * MAX_BACKOFF_S)
                backoff.reset()
                complaint.settle()
                if listing.version == version:
                    await asyncio.sleep(MIN_BACKOFF_S)  # an honest long poll ends by time; do not spin on another
                version = listing.version

    def take(self, listing: Listing) -> None:
        """The directory's word: who exists, who drains."""
        listed: dict[str, Entry] = {}
        for entry in listing.replicas[:MAX_REPLICAS]:
            endpoint = f"tcp:{entry.host}:{entry.port}"
            try:
                parse_endpoint(endpoint)
            except SettingsError as error:
                logger.warning("directory: %s", error)
                continue
            listed[endpoint] = entry
        for endpoint, entry in listed.items():
            replica = self._add(endpoint)
            replica.is_draining = entry.state == "draining"
            if replica.link is not None:
                replica.link.is_draining = replica.is_draining
        for endpoint, replica in self._fleet.replicas.items():
            replica.is_listed = endpoint in listed


def _cause(error: Exception) -> str:
    """What `/readyz` may say of a failed dial: the system's own messages have addresses and paths in them."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and type(error) is not ConnectionError:  # which is our own word, see connection.py
        return os.strerror(error.errno) if error.errno else "no connection"
    return str(error) or type(error).__name__


async def _poll(client: httpx.AsyncClient, url: str, version: int) -> Listing:
    body = bytearray()
    async with client.stream("GET", url, params={"since": version}) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_LISTING_BYTES:
                raise ValueError(f"listing exceeds {MAX_LISTING_BYTES} bytes")
    return msgspec.json.decode(body, type=Listing)
