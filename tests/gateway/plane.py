"""The small world of the data plane's tests: clients with journals, a dispatcher, fake replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from serving.config import GatewaySettings
from serving.gateway.dispatch import Dispatch
from serving.gateway.streams import Choice, Request
from serving.types import NO_LOGPROBS, ModelCard, SamplingParams
from serving.wire import pack_ids
from tests.faults import SECRET, FakeReplica
from tests.scripted import make_card, undisturbed

CARD = make_card()
_numbers = itertools.count()


class Client:
    """A request and what its `on_progress` saw."""

    def __init__(
        self,
        *,
        n: int = 1,
        prompt: tuple[int, ...] = (11, 12, 13),
        seed: int = 1,
        max_tokens: int = 40,
        logprobs: int = NO_LOGPROBS,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = True,
        priority: int = 0,
        deadline: float = float("inf"),
        card: ModelCard = CARD,
        name: str | None = None,
    ) -> None:
        self.request = Request(
            id=name or f"cmpl-{next(_numbers)}", created=0, card=card, deadline=deadline, priority=priority
        )
        for index in range(n):
            sampling = SamplingParams(
                seed=seed,
                choice=index,
                max_tokens=max_tokens,
                logprobs=logprobs,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
            )
            self.request.choices.append(Choice(index, self.request, pack_ids(prompt), sampling))
        self.progress: list[tuple[int, int]] = []  # (choice index, length of its journal)
        self.on_token: Callable[[Choice], None] = lambda choice: None
        self.request.on_progress = self._on_progress

    def _on_progress(self, choice: Choice) -> None:
        self.progress.append((choice.index, len(choice.output_ids)))
        self.on_token(choice)

    @property
    def choice(self) -> Choice:
        return self.request.choices[0]

    @property
    def is_done(self) -> bool:
        return all(choice.is_done for choice in self.request.choices)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.output_ids) for choice in self.request.choices)

    async def done(self, timeout_s: float = 10.0) -> None:
        await until(lambda: self.is_done, timeout_s)


def mixed_clients(seed: int, count: int = 16, **fixed: Any) -> list[Client]:
    """Streams of every kind: lengths, several choices, logprobs, stop ids, natural ends."""
    draw = random.Random(seed)
    return [
        Client(
            prompt=tuple(draw.randrange(20, 300) for _ in range(draw.randrange(1, 40))),
            n=draw.choice((1, 1, 1, 3)),
            seed=draw.randrange(1 << 64),
            max_tokens=draw.randrange(1, 60),
            logprobs=draw.choice((NO_LOGPROBS, NO_LOGPROBS, 0, 5)),
            stop_token_ids=draw.choice(((), (), (30, 31, 32))),
            ignore_eos=draw.choice((True, False)),
            **fixed,
        )
        for _ in range(count)
    ]


def assert_undisturbed(client: Client) -> None:
    """Every journal is what it would be had nothing ever failed."""
    for choice in client.request.choices:
        ids, logprobs, finish, stop_token_id = undisturbed(choice.prompt_ids, choice.sampling, client.request.card)
        assert choice.error is None
        assert list(choice.output_ids) == ids
        assert choice.logprobs == logprobs
        assert (choice.finish, choice.stop_token_id) == (finish, stop_token_id)
        assert choice.cached_tokens == len(choice.prompt_ids) // 4 // 16 * 16


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Polls: what the tests wait for happens in other tasks and in other objects than one event could cover."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def all_ready(dispatch: Dispatch) -> None:
    await until(lambda: all(entry["state"] == "ready" for entry in dispatch.progress()))


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs an asynchronous test on a loop of its own."""
    asyncio.run(test)


@contextlib.contextmanager
def socket_paths(count: int) -> Iterator[list[str]]:
    """Endpoints of fresh Unix sockets; their folder's name is short, for the kernel's limit of 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="argosy-") as folder:
        yield [f"unix:{Path(folder) / f'r{number}'}" for number in range(count)]


@contextlib.asynccontextmanager
async def plane(num_replicas: int = 1, /, **options: Any) -> AsyncIterator[tuple[Dispatch, list[FakeReplica]]]:
    """A started dispatcher whose replicas are all connected. options: of FakeReplica or GatewaySettings."""
    asked = {key: options.pop(key) for key in list(options) if key in GatewaySettings.__dataclass_fields__}
    with socket_paths(num_replicas) as endpoints:
        replicas = [FakeReplica(at, name=f"replica-{number}", **options) for number, at in enumerate(endpoints)]
        async with contextlib.AsyncExitStack() as stack:
            for replica in replicas:
                await stack.enter_async_context(replica)
            dispatch = Dispatch(GatewaySettings(fd=-1, **{"replicas": tuple(endpoints), "secret": SECRET, **asked}))
            stack.push_async_callback(dispatch.close)
            await dispatch.start()
            await until(lambda: len(dispatch.progress()) == num_replicas)
            await all_ready(dispatch)
            yield dispatch, replicas
        for replica in replicas:
            assert replica.violations == []
