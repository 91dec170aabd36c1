"""Real rank processes for the tests: each obeys one order at a time and keeps what it connected to."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from models.parallel import TransportError
from models.transports.connect import Ranks, Rendezvous, connect, host_store

_names = (f"gang-{os.getpid()}-{number}" for number in itertools.count())

Work = Callable[..., Any]
"""Called in a rank's process as `work(ranks, *arguments)`; a function of a test module."""


def _obey(orders: Connection) -> None:
    """The process: (work, arguments) in, (result, problem) out, until EOF."""
    torch.set_num_threads(1)
    ranks: Ranks | None = None
    while True:
        try:
            work, arguments = orders.recv()
        except EOFError:
            os._exit(0)
        try:
            if isinstance(work, Rendezvous):
                ranks = connect(work, **arguments)
                orders.send((None, ""))
            else:
                orders.send((work(ranks, *arguments), ""))
        except TransportError as error:
            orders.send((None, str(error)))


@dataclasses.dataclass
class RankProcess:
    process: Any
    orders: Connection

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def start(self, work: Work | Rendezvous, arguments: Any) -> None:
        self.orders.send((work, arguments))

    def result(self, timeout_s: float = 60.0) -> Any:
        """Of the oldest order without one. A TransportError there is one here."""
        if not self.orders.poll(timeout_s):
            raise TimeoutError(f"rank process {self.pid} said nothing within {timeout_s} s")
        result, problem = self.orders.recv()
        if problem:
            raise TransportError(problem)
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclasses.dataclass
class Gang:
    """Connected ranks, and where they met."""

    ranks: list[RankProcess]
    store: Any

    def run(self, work: Work, *arguments: Any) -> list[Any]:
        """Results of `work` on every rank, in rank order."""
        for rank in self.ranks:
            rank.start(work, arguments)
        return [rank.result() for rank in self.ranks]

    def on(self, rank: int, work: Work, *arguments: Any) -> Any:
        self.ranks[rank].start(work, arguments)
        return self.ranks[rank].result()


class Pool:
    """Processes that one gang after another is made of: a fork costs milliseconds, an import of torch a second."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._ranks: list[RankProcess] = []

    def connect(self, kind: str, *, tp: int = 1, pp: int = 1, timeout_s: float = 60.0, **fields: Any) -> Gang:
        self._ranks = [rank for rank in self._ranks if rank.process.is_alive()]
        while len(self._ranks) < tp * pp:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_obey, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(RankProcess(process, ours))
        store, name = host_store(), next(_names)
        gang = Gang(self._ranks[: tp * pp], store)
        for number, rank in enumerate(gang.ranks):
            place = Rendezvous(number, tp, pp, kind, name, store.host, store.port, **fields)
            rank.start(place, {"timeout_s": timeout_s})
        for rank in gang.ranks:
            rank.result()
        return gang

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()


@contextlib.contextmanager
def closed_after(ranks: Ranks, seconds: float) -> Iterator[None]:
    """Another thread closes what the body waits for."""

    def close() -> None:
        time.sleep(seconds)
        ranks.close()

    thread = threading.Thread(target=close)
    thread.start()
    try:
        yield
    finally:
        thread.join()
