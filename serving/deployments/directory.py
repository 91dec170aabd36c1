"""Where the replicas are (C20): a one-replica Serve deployment at /directory on Serve's own proxy.

`GET /directory?since=V` answers `{version, replicas: [{id, epoch, host, port, card, state}]}`: at once
when the listing's version is not V, else as soon as it changes, or unchanged after `HOLD_S`. Replicas
renew by handle every `RENEW_S`; an entry that nobody renewed for `EXPIRE_S` is dropped. Everything
here is rebuilt by the next renewals after a restart, so nothing is stored.

`GET /directory/starts` tells how replicas start, for whoever waits for them. `POST /directory/demand` is how gateways
tell what waits in them (serving/demand.py). While something waits and no replica is there, one call of the replicas'
`wake` is kept open: a handle with a queued call is what makes Serve start the first replica.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from serving.demand import MAX_REPORT_BYTES, PROOF_HEADER, DemandReply
from serving.deployments.demand import HeldDemand
from serving.deployments.document import MODEL_APP, MODEL_DEPLOYMENT

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger("ray.serve")

RENEW_S: Final = 2.0
EXPIRE_S: Final = 10.0
HOLD_S: Final = 20.0
MAX_ENTRIES: Final = 4096
MAX_REPORTS: Final = 256
NEWS_S: Final = 1.0
"""A replica that asks for the demand is answered so late at most."""
WAKE_AGAIN_S: Final = 1.0


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as the listing shows it."""

    id: str
    epoch: int
    host: str
    port: int
    card: dict[str, Any]
    state: str  # ready | draining


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A phase of a replica's cold start, why there was no next one, or how far its weights are."""

    number: int
    replica: str
    phase: str
    seconds: float = 0.0
    failure: str = ""
    done_bytes: int = 0
    total_bytes: int = 0  # above 0 while weights are read


class Directory:
    """The membership of one cluster. Every method runs on the deployment's event loop."""

    def __init__(
        self,
        expire_s: float = EXPIRE_S,
        *,
        secret_file: str = "",
        wake: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """secret_file: of the engine secret; "" = no gateway can tell its demand. wake: returns when a replica runs."""
        self._expire_s = expire_s
        self._demand = HeldDemand(secret_file)
        self._num_news = 0
        self._told = asyncio.Condition()
        self._wake = wake or _wake_replica
        self._waking: asyncio.Task[None] | None = None
        self._waking_since = 0.0
        self._start_s: float | None = None  # that the last start from zero took
        # A restarted directory must not repeat a version that somebody waits on.
        self._version = time.time_ns() // 1_000_000
        self._entries: dict[str, tuple[Entry, float]] = {}
        self._reports: collections.deque[Report] = collections.deque(maxlen=MAX_REPORTS)
        self._num_reports = 0
        self._changed = asyncio.Condition()
        self._sweeper: asyncio.Task[None] | None = None

    async def renew(self, entry: dict[str, Any]) -> None:
        """A replica says that it is there. Raises msgspec.ValidationError, ValueError."""
        self._start_sweeping()
        new = msgspec.convert(entry, Entry)
        old = self._entries.get(new.id)
        if old is None and len(self._entries) >= MAX_ENTRIES:
            raise ValueError(f"the directory holds its limit of {MAX_ENTRIES} replicas")
        self._entries[new.id] = (new, time.monotonic())
        if old is None or old[0] != new:
            await self._bump()

    async def leave(self, replica: str) -> None:
        """A replica goes, after its drain."""
        if self._entries.pop(replica, None) is not None:
            await self._bump()

    async def report(self, replica: str, phase: str, seconds: float, failure: str = "") -> None:
        """A replica tells how its start goes."""
        self._num_reports += 1
        self._reports.append(
            Report(number=self._num_reports, replica=replica, phase=phase, seconds=seconds, failure=failure)
        )

    async def report_load(self, replica: str, done_bytes: int, total_bytes: int, seconds: float) -> None:
        """A replica tells how far its weights are; only the latest such news of each is kept."""
        self._num_reports += 1
        for old in [report for report in self._reports if report.replica == replica and report.total_bytes]:
            self._reports.remove(old)
        latest = Report(
            number=self._num_reports,
            replica=replica,
            phase="weights",
            seconds=seconds,
            done_bytes=done_bytes,
            total_bytes=total_bytes,
        )
        self._reports.append(latest)

    async def __call__(self, request: Request) -> Response:
        from starlette.responses import Response

        path = request.url.path.rstrip("/")
        if path.endswith("/demand") and request.method == "POST":
            return await self._take_demand(request)
        if path.endswith("/starts"):
            body: Any = {"ready": len(self._entries), "reports": list(self._reports)}
        else:
            try:
                since = int(request.query_params.get("since", "-1"))
            except ValueError:
                return Response('{"error": "since must be a whole number"}', 400, media_type="application/json")
            body = await self.listing(since)
        return Response(msgspec.json.encode(body), media_type="application/json")

    async def listing(self, since: int, hold_s: float = HOLD_S) -> dict[str, Any]:
        """What GET answers; waits up to `hold_s` while the version is still `since`."""
        self._start_sweeping()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(hold_s), self._changed:
                await self._changed.wait_for(lambda: self._version != since)
        return {"version": self._version, "replicas": [entry for entry, _ in self._entries.values()]}

    # --- demand -----------------------------------------------------------------------------------

    async def demand(self, model: str, news: int) -> dict[str, Any]:
        """What waits for a model in all gateways; at once when there were news since `news`, else after NEWS_S.

        `choices` is -1 while no gateway has told.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEWS_S), self._told:
                await self._told.wait_for(lambda: self._num_news != news)
        choices, tokens, age_s = self._demand.total(model) or (-1, 0, 0.0)
        return {"news": self._num_news, "choices": choices, "tokens": tokens, "age_s": age_s}

    async def _take_demand(self, request: Request) -> Response:
        from starlette.responses import Response

        try:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_REPORT_BYTES:
                    break  # refused below, for its length
            is_news = self._demand.take(bytes(body), request.headers.get(PROOF_HEADER, ""))
        except (PermissionError, ValueError, msgspec.MsgspecError) as error:
            status = 403 if isinstance(error, PermissionError) else 400
            return Response(msgspec.json.encode({"error": str(error)}), status, media_type="application/json")
        self._start_sweeping()
        if is_news:
            self._num_news += 1
            async with self._told:
                self._told.notify_all()
        self._look_whether_to_wake()
        reply = DemandReply(num_ready=self._num_ready, ready_in_s=self._ready_in_s())
        return Response(msgspec.json.encode(reply), media_type="application/json")

    @property
    def _num_ready(self) -> int:
        return sum(entry.state == "ready" for entry, _ in self._entries.values())

    def _look_whether_to_wake(self) -> None:
        """One call of `wake` is open exactly while something waits and nobody serves."""
        is_needed = not self._num_ready and self._demand.num_choices > 0
        is_open = self._waking is not None and not self._waking.done()
        if is_needed and not is_open:
            logger.info("directory: %d choices wait and no replica is there: waking one", self._demand.num_choices)
            self._waking_since = time.monotonic()
            self._waking = asyncio.create_task(self._keep_waking())
        elif is_open and not is_needed and self._waking is not None:
            if self._num_ready:
                # What came may have been on its way already; its own account of the start is then the longer one.
                told = [report for report in self._reports if report.replica in self._entries]
                loading_s = sum(report.seconds for report in told if not report.total_bytes)
                self._start_s = max(time.monotonic() - self._waking_since, loading_s / max(self._num_ready, 1))
            self._waking.cancel()

    async def _keep_waking(self) -> None:
        while True:
            try:
                await self._wake()
            except Exception as error:  # of many kinds; whoever waits must not wait for ever because of one
                logger.debug("directory: wake: %s", error)
            await asyncio.sleep(WAKE_AGAIN_S)  # a replica that runs renews at once: then this ends

    def _ready_in_s(self) -> float | None:
        if self._start_s is None or self._waking is None or self._waking.done():
            return None
        return max(self._start_s - (time.monotonic() - self._waking_since), 1.0)

    async def _bump(self) -> None:
        self._look_whether_to_wake()
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    def _start_sweeping(self) -> None:
        if self._sweeper is None:  # not in __init__: it need not run on the loop
            self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        looked_s = time.monotonic()
        while True:
            await asyncio.sleep(self._expire_s / 20)
            now = time.monotonic()
            if now - looked_s > 1.0 + self._expire_s / 20:
                # We stood still ourselves: renewals wait unread, nobody has expired.
                self._entries = {key: (entry, now) for key, (entry, _) in self._entries.items()}
            looked_s = now
            expired = [key for key, (_, renewed_s) in self._entries.items() if now - renewed_s > self._expire_s]
            for key in expired:
                del self._entries[key]
            if expired:
                await self._bump()
            self._look_whether_to_wake()


async def _wake_replica() -> None:
    """Returns when a replica runs; until then the call is queued in its handle, which Serve counts as demand."""
    from ray import serve

    response = serve.get_deployment_handle(MODEL_DEPLOYMENT, MODEL_APP).wake.remote()
    try:
        await response
    except asyncio.CancelledError:
        response.cancel()
        raise
