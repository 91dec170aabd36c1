"""Objects as they are now: listed once, then watched, and listed again whenever a watch ends.

A lost event is what kept peers' routers sending to dead pods for hours; here the end of a watch, whatever its reason,
is the begin of a new list.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Final

from k8s.objects import Object
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError, ToolError
from k8s.tool.kinds import Kind

FIRST_PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 10.0
FORBIDDEN_PAUSE_S: Final = 30.0


@dataclasses.dataclass(slots=True)
class _State:
    items: dict[str, Object] = dataclasses.field(default_factory=dict)
    error: str = "not read yet"
    num_lists: int = 0


class Mirror:
    """A namespace's objects of some kinds, kept by a thread for each kind. Use as a context manager."""

    def __init__(self, cluster: Cluster, namespace: str, kinds: tuple[Kind, ...], labels: str = "") -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._labels = labels
        self._states = {kind: _State() for kind in kinds}
        self._changed = threading.Condition()
        self._version = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(kind,), daemon=True) for kind in kinds]

    def __enter__(self) -> Mirror:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._cluster.timeout_s + 5.0)

    def items(self, kind: Kind) -> list[Object]:
        with self._changed:
            return list(self._states[kind].items.values())

    def find(self, kind: Kind, name: str) -> Object | None:
        return next((thing for thing in self.items(kind) if thing["metadata"]["name"] == name), None)

    def error(self, kind: Kind) -> str:
        """Why a kind is not known right now; "" when it is."""
        with self._changed:
            return self._states[kind].error

    def num_lists(self, kind: Kind) -> int:
        with self._changed:
            return self._states[kind].num_lists

    def wait(self, seen: int, timeout_s: float) -> int:
        """Until something has changed since `seen` (0 at first), or time is up: the new number of changes."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._version == seen and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return self._version

    def _keep(self, kind: Kind) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.is_set():
            try:
                listing = self._cluster.select(kind, self._namespace, labels=self._labels)
                self._set(kind, {_key(thing): thing for thing in listing.items})
                for event, thing in self._cluster.watch(
                    kind, self._namespace, listing.version, self._stop, labels=self._labels
                ):
                    pause_s = FIRST_PAUSE_S
                    self._take(kind, event, thing)
            except ToolError as error:
                if isinstance(error, ApiError) and error.status == 410:
                    continue
                self._fail(kind, str(error))
                is_forbidden = isinstance(error, ApiError) and error.is_forbidden
                pause_s = FORBIDDEN_PAUSE_S if is_forbidden else min(2 * pause_s, MAX_PAUSE_S)
            self._stop.wait(pause_s)

    def _set(self, kind: Kind, items: dict[str, Object]) -> None:
        with self._changed:
            state = self._states[kind]
            state.items, state.error = items, ""
            state.num_lists += 1
            self._version += 1
            self._changed.notify_all()

    def _take(self, kind: Kind, event: str, thing: Object) -> None:
        if event == "BOOKMARK":
            return
        with self._changed:
            items = self._states[kind].items
            if event == "DELETED":
                items.pop(_key(thing), None)
            else:
                items[_key(thing)] = thing
            self._version += 1
            self._changed.notify_all()

    def _fail(self, kind: Kind, error: str) -> None:
        with self._changed:
            self._states[kind].error = error
            self._version += 1
            self._changed.notify_all()


def _key(thing: Object) -> str:
    metadata = thing["metadata"]
    return f"{metadata.get('namespace', '')}/{metadata['name']}"
