"""The emulated API server in a thread, with a kubeconfig that leads to it."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kmock
import yaml

from tests.k8s.api_json import CLUSTER_SCOPED, PLURALS, Object
from tests.k8s.api_server import ApiServer
from tests.k8s.api_state import Fault, State


class Running:
    """A server that answers until `close`."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [{"name": "test", "cluster": {"server": self.url}}],
                    "users": [{"name": "test", "user": {"token": "not-a-secret"}}],
                }
            ),
            encoding="utf-8",
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self.server = ApiServer.make()
        async with self.server, kmock.Server(self.server) as listening:
            self.url = f"http://127.0.0.1:{listening.port}"
            self._ready.set()
            await self._stop.wait()
            self.server.end_watches()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def state(self) -> State:
        return self.server.state

    def do(self, action: Callable[[], Any]) -> Any:
        """In the server's thread, waited for."""

        async def act() -> Any:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(10)

    def put(self, *things: Object) -> None:
        for thing in things:
            self.do(lambda thing=thing: self.server.store(thing))

    def drop(self, thing: Object) -> None:
        self.do(lambda: self.server.drop(thing))

    def find(self, kind: str, name: str, namespace: str = "argosy") -> Object | None:
        place = "" if kind in CLUSTER_SCOPED else namespace
        return self.do(lambda: self.server.find(kind, name, place))  # type: ignore[no-any-return]

    def all(self, kind: str) -> list[Object]:
        return self.do(lambda: self.server.all(kind))  # type: ignore[no-any-return]

    def snapshot(self) -> list[Object]:
        """All objects, for `restore`."""
        return [thing for kind in PLURALS for thing in self.all(kind)]

    def restore(self, things: list[Object]) -> None:
        """Have these objects and no others, without telling anybody."""

        def act() -> None:
            self.server.objects.clear()
            for thing in things:
                metadata = thing["metadata"]
                self.server.objects[PLURALS[thing["kind"]], metadata.get("namespace") or None, metadata["name"]] = (
                    copy.deepcopy(thing)
                )

        self.do(act)

    def fault(self, pattern: str, **what: Any) -> Fault:
        fault = Fault(pattern, **what)
        self.state.faults.append(fault)
        return fault
