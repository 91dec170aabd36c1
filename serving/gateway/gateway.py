"""What every handler of one gateway process shares."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from serving.config import GatewaySettings
from serving.errors import ModelNotFound, NoCapacity
from serving.gateway.admission import Admission
from serving.gateway.clock import Clock, Ids
from serving.gateway.demand import Demand
from serving.gateway.language import Languages
from serving.gateway.lives import Lives
from serving.gateway.operators import Operators
from serving.gateway.reply import Pace, Reply
from serving.gateway.streams import Dispatcher
from serving.gateway.tenants import Tenants
from serving.gateway.wakes import Wakes
from serving.metrics.page import Metrics
from serving.metrics.snapshot import PlaneView
from serving.types import ModelCard

CARD_POLL_S = 0.05


class DataPlane(Dispatcher, Protocol):
    """What the process as a whole needs of the data plane, beside submitting requests."""

    demand: Demand

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def cards(self) -> list[ModelCard]: ...

    async def asset(self, card: ModelCard, name: str) -> Path: ...

    def progress(self) -> list[dict[str, Any]]: ...

    def view(self) -> PlaneView: ...

    def is_ready(self) -> tuple[bool, str]: ...


@dataclasses.dataclass(slots=True)
class Gateway:
    """One process's parts, wired once by `app.build_app`."""

    settings: GatewaySettings
    dispatch: DataPlane
    languages: Languages
    clock: Clock
    ids: Ids
    metrics: Metrics
    tenants: Tenants
    admission: Admission
    operators: Operators
    pace: Pace
    created: Callable[[], int]
    lives: Lives = dataclasses.field(default_factory=Lives)
    wakes: Wakes = dataclasses.field(default_factory=Wakes)
    replies: set[Reply] = dataclasses.field(default_factory=set)  # under way
    is_draining: bool = False

    async def card(self, model: str | None, is_waiting: Callable[[], bool] = lambda: True) -> ModelCard:
        """Card of the model that a request names; None = the served one.

        While no replica has ever connected, a request for the served model waits for the first.
        Raises ModelNotFound, or NoCapacity when none connects within the queue timeout.
        """
        served = self.settings.served_model_name
        name = served if model is None else model
        card = self.dispatch.card(name)
        if card is not None:
            return card
        cards = self.dispatch.cards()
        if model is None and cards:
            return cards[0]
        if cards or (served and name != served):
            known = ", ".join(repr(card.model) for card in cards) or repr(served)
            raise ModelNotFound(f"The model {name[:64]!r} does not exist; served: {known}.", param="model")
        give_up_at = self.clock.monotonic() + self.settings.queue_timeout_s
        with self.dispatch.demand.holding():
            while self.clock.monotonic() < give_up_at and is_waiting():
                await asyncio.sleep(CARD_POLL_S)
                card = self.dispatch.card(name)
                if card is not None:
                    return card
        message = f"No replica of model {name[:64]!r} has started yet."
        retry_after_s = self.dispatch.demand.retry_after_s() or 5.0
        raise NoCapacity(message, retry_after_s=retry_after_s, reason="no_endpoints")
