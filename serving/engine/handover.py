"""Keyed rows on their way from a connection that ended to the one that asks for them (C22).

Everything here runs in the server's loop, but `rebind`, which the step loop runs between two steps:
outputs posted before it carry the row's old key, outputs after it the new one, and `_attach` comes
exactly between them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import msgspec

from serving import wire
from serving.engine.connection import Connection
from serving.engine.core import EngineCore
from serving.engine.held import HOLD_S, HeldRow, HeldRows, Key
from serving.engine.output import StepOutput
from serving.engine.translate import held_steps


class Handover:
    """The keyed rows of a replica and what they have brought so far."""

    def __init__(
        self, core: EngineCore, post: Callable[..., None], connections: Mapping[int, Connection], rows: HeldRows
    ) -> None:
        """post: runs a function with arguments in the server's loop; called from the step loop."""
        self._core = core
        self._post = post
        self._connections = connections
        self._rows = rows

    def submitted(self, key: Key, submit: wire.Submit) -> None:
        if submit.is_keyed:
            brief = msgspec.structs.replace(submit, prompt_ids=b"", resume_ids=b"")
            self._rows.hold(HeldRow(key, brief, first_position=len(submit.resume_ids) // 4))

    def forget(self, key: Key) -> None:
        """The row was cancelled or rejected by whoever reads it."""
        self._rows.take(key)

    def orphan(self, key: Key) -> None:
        """The row's connection has ended: it runs on for a while."""
        self._rows.orphan(key, time.monotonic() + HOLD_S)

    def keep(self, output: StepOutput) -> None:
        self._rows.keep(output, time.monotonic() + HOLD_S)

    def expire(self) -> None:
        """Drop what has been held too long or takes too much memory."""
        dropped = self._rows.expire(time.monotonic())
        if dropped:
            self._cancel([row.key for row in dropped])

    def find(self, connection: Connection, find: wire.Find) -> None:
        """Give the row to `connection`: its tokens from `find.position` on, then what follows.

        Raises WireError when the handle is in use.
        """
        if find.handle in connection.live:
            raise wire.WireError(f"handle {find.handle} is in use")
        held = self._rows.find(find.request_id, find.choice)
        if held is None or find.position < held.first_position:
            _reject(connection, find.handle)
            return
        connection.live[find.handle] = held.submit
        self._move(connection, find)

    def _move(self, connection: Connection, find: wire.Find) -> None:
        held = self._rows.find(find.request_id, find.choice)
        if held is None:
            self._drop(connection, find)
            return
        if held.is_moving:  # to someone else, who may be gone by then: look again when it is there
            self._core.call(lambda: self._post(self._move, connection, find))
            return
        held.is_moving = True
        old, new = held.key, (connection.number, find.handle)

        def rebind() -> None:
            self._core.scheduler.rebind(old, new)
            self._post(self._attach, connection, find, old)

        self._core.call(rebind)

    def _attach(self, connection: Connection, find: wire.Find, old: Key) -> None:
        held = self._rows.take(old)
        is_wanted = find.handle in connection.live  # not cancelled meanwhile
        if held is None or not is_wanted or find.position > held.first_position + len(held.tokens):
            self._cancel([(connection.number, find.handle)])
            self._drop(connection, find)
            return
        owner = self._connections.get(old[0])
        if owner is not None and owner.live.pop(old[1], None) is not None:
            owner.send(wire.Reject(old[1], "taken_over", "another connection asked for this row"))
        held.key = (connection.number, find.handle)
        held.is_moving = False
        if held.finished is not None:
            connection.live.pop(find.handle)
        else:
            held.until_s = math.inf if connection.is_open else time.monotonic() + HOLD_S
        self._rows.hold(held)
        if connection.is_open:
            for step in held_steps(held, find, self._core.num_steps, connection.granted):
                connection.send(step)

    def _drop(self, connection: Connection, find: wire.Find) -> None:
        if connection.live.pop(find.handle, None) is not None:
            _reject(connection, find.handle)

    def _cancel(self, keys: list[Key]) -> None:
        def cancel() -> None:
            for key in keys:
                self._core.scheduler.cancel(key)

        self._core.call(cancel)


def _reject(connection: Connection, handle: int) -> None:
    connection.send(wire.Reject(handle, "not_found", "no such row is held"))
