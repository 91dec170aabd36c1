"""What waits in this gateway, told to the directory: the reason to start a replica, the first one included.

Requests that wait in queues, and those that wait for a model of which no replica has ever been seen. A report goes out
every second, and at once when something begins to wait. Silence of the directory changes nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from serving.config import GatewaySettings
from serving.demand import PROOF_HEADER, DemandReply, DemandReport, sign

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("argosy.gateway")

REPORT_S: Final = 1.0
LOOK_S: Final = 0.2
GROWTH: Final = 1.5
"""So much more than was last told is told at once."""
MAX_PAUSE_S: Final = 5.0
HEARD_S: Final = 15.0
"""A directory that has taken a report within this time would start a replica."""
MAX_RETRY_AFTER_S: Final = 120.0
MAX_MODELS: Final = 64
_decoder = msgspec.json.Decoder(DemandReply)

Waiting = Mapping[str, tuple[int, int]]
"""(choices, tokens) by model."""


class Demand:
    """The demand of one gateway process. Runs on the event loop."""

    def __init__(self, settings: GatewaySettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._num_held = 0
        self._heard_at: float | None = None
        self._ready_at: float | None = None

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """A request waits for the served model's first replica."""
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1

    @property
    def can_wake(self) -> bool:
        """Whether a request that comes now would start a replica where there is none."""
        is_heard = self._heard_at is not None and self._clock() - self._heard_at <= HEARD_S
        return self._settings.can_wake and is_heard

    def retry_after_s(self) -> float | None:
        """Until the replica that is being started for what waits will serve; None = not known."""
        if self._ready_at is None:
            return None
        return min(max(self._ready_at - self._clock(), 1.0), MAX_RETRY_AFTER_S)

    async def report_for_ever(self, url: str, secret: bytes, waiting: Callable[[], Waiting]) -> None:
        """url: of the directory. waiting: what the queues hold now."""
        import httpx

        told, told_at, pause_s = 0, -REPORT_S, 0.0
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while True:
                await asyncio.sleep(LOOK_S + pause_s)
                models = self._models(waiting())
                choices = sum(count for count, _ in models.values())
                is_more = choices > told * GROWTH
                if not is_more and self._clock() - told_at < REPORT_S:
                    continue
                try:
                    await self._report(client, url.rstrip("/") + "/demand", secret, models)
                    pause_s = 0.0
                except Exception as error:  # whatever it was: without this task nobody ever hears of what waits here
                    logger.debug("demand: %s", error)
                    pause_s = min(2.0 * pause_s + LOOK_S, MAX_PAUSE_S)
                told, told_at = choices, self._clock()

    async def _report(self, client: httpx.AsyncClient, url: str, secret: bytes, models: Waiting) -> None:
        report = DemandReport(
            gateway=self._settings.name,
            sent_at=time.time(),
            choices={model: choices for model, (choices, _) in models.items()},
            tokens={model: tokens for model, (_, tokens) in models.items()},
        )
        body = msgspec.json.encode(report)
        answer = await client.post(url, content=body, headers={PROOF_HEADER: sign(secret, body)})
        answer.raise_for_status()
        reply = _decoder.decode(answer.content)
        self._heard_at = self._clock()
        self._ready_at = None if reply.ready_in_s is None else self._heard_at + reply.ready_in_s

    def _models(self, waiting: Waiting) -> dict[str, tuple[int, int]]:
        models = dict(list(waiting.items())[:MAX_MODELS])
        if self._num_held:
            choices, tokens = models.get(self._settings.served_model_name, (0, 0))
            models[self._settings.served_model_name] = choices + self._num_held, tokens
        return models
