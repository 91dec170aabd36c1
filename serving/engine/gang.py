"""The other ranks of a replica as rank 0 sees them: one life and one death (C11, C13).

A thread of its own reads what they send. A rank whose connection ends, that sends no beat for 1.5 s or
whose step is older than its announced cost allows ends the gang at once: its processes on this machine
are killed, for a stopped one ignores everything else, and the connections close, which ends the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from serving.engine.rank_wire import (
    Failed,
    FromRank,
    Loaded,
    Message,
    Passed,
    Pulse,
    RankReader,
    Sampled,
    machine,
    message_frame,
)
from serving.types import RankState

log = logging.getLogger(__name__)

SILENCE_S: Final = 1.5
LOADING_SILENCE_S: Final = 15.0  # reading weights may hold the interpreter for long
CLOSING_S: Final = 1.0
_LOOK_S: Final = 0.05
_LAG_S: Final = 0.25
_IDLE_S: Final = 0.5


class GangFailed(Exception):
    """A rank has died, hangs or has failed; the text says which and why."""


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """A rank at the other end of a socket."""

    rank: int
    sock: socket.socket
    heard_s: float
    reader: RankReader = dataclasses.field(default_factory=RankReader)
    pulse: Pulse | None = None
    loaded: Loaded | None = None
    process: int = -1  # a descriptor of it (pidfd): never of another that got its number; -1 = not on this machine

    def __str__(self) -> str:
        where = f" (pid {self.pulse.pid} on {self.pulse.host})" if self.pulse else ""
        return f"rank {self.rank}{where}"


class Gang:
    """Ranks 1 … N-1. Any thread may send; `guard` tells whom to call when it is over."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        """sockets: connected streams to ranks 1, 2, …; closed by `close`."""
        now = time.monotonic()
        self.members = [Member(rank, sock, now) for rank, sock in enumerate(sockets, 1)]
        self.failure: GangFailed | None = None
        self.machine = machine()
        self.results: queue.SimpleQueue[Sampled | GangFailed] = queue.SimpleQueue()
        self._busy_s: dict[int, float] = {}  # by stage
        self._changed = threading.Condition()
        self._on_failure: Callable[[GangFailed], None] | None = None
        self._on_end: list[Callable[[], None]] = []
        self._limit_s: Callable[[], float] | None = None
        self._ending = threading.Lock()
        self._is_over = False
        self._heard_since_s = now  # no judgement before this and the time that it needs
        self._selector = selectors.DefaultSelector()
        for member in self.members:
            member.sock.setblocking(True)
            self._selector.register(member.sock, selectors.EVENT_READ, member)
        self._thread = threading.Thread(target=self._watch, name="gang-watch", daemon=True)
        self._thread.start()

    # --- speaking -------------------------------------------------------------------------------

    def tell(self, member: Member, message: Message) -> None:
        """Raises OSError when the rank is gone."""
        member.sock.sendall(message_frame(message))

    def tell_all(self, frame: bytes) -> None:
        """The same bytes to every rank. Raises OSError when one is gone."""
        for member in self.members:
            member.sock.sendall(frame)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until `condition`, which is looked at whenever a rank says something. Raises GangFailed."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or condition())
        if self.failure is not None:
            raise self.failure

    def wake(self) -> None:
        """Have `wait` look again."""
        with self._changed:
            self._changed.notify_all()

    def guard(self, on_failure: Callable[[GangFailed], None], limit_s: Callable[[], float]) -> None:
        """From now on, call on_failure when the gang is over. limit_s: how old a running step may become."""
        self._on_failure, self._limit_s = on_failure, limit_s
        if self.failure is not None:
            on_failure(self.failure)

    def at_the_end(self, function: Callable[[], None]) -> None:
        """Call `function` when the gang ends, to wake who waits for one of its ranks; at once if it is over."""
        self._on_end.append(function)
        if self._is_over:  # perhaps both of us call it: it must bear that
            function()

    def busy_s(self) -> float:
        """How long the stages between the first and the last computed for a recent step."""
        return sum(self._busy_s.values())

    def cause_of(self, error: Exception) -> Exception:
        """What is behind an error in talking or computing with the ranks; waits a little for the news."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, timeout=SILENCE_S + 1.0)
        return self.failure or error

    # --- health ---------------------------------------------------------------------------------

    def states(self) -> list[RankState]:
        now = time.monotonic()
        return [_state(member, now) for member in self.members]

    def _judge(self, now: float) -> None:
        if now - self._heard_since_s < SILENCE_S:
            return
        limit_s = self._limit_s() if self._limit_s is not None else None
        for member in self.members:
            silence_s = now - max(member.heard_s, self._heard_since_s)
            pulse = member.pulse
            patience_s = SILENCE_S if pulse is not None and not pulse.is_loading else LOADING_SILENCE_S
            if silence_s > patience_s:
                self.end(f"{member} has been silent for {silence_s:.1f} s")
            elif limit_s is not None and pulse is not None and pulse.age_s > limit_s:
                self.end(
                    f"the running step of {member} is {pulse.age_s:.1f} s old; {limit_s:.1f} s are its limit"
                    + self._suspicion(now)
                )

    def _suspicion(self, now: float) -> str:
        """An old step may be one that waits: for whoever is silent, though not yet for long enough to be convicted."""
        quietest = min(self.members, key=lambda member: member.heard_s)
        silence_s = now - quietest.heard_s
        return f", and {quietest} has been silent for {silence_s:.1f} s" if silence_s > _IDLE_S else ""

    # --- the thread that listens ----------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._look_until_the_end()
        except Exception as error:  # unwatched, a gang could hang for ever
            log.exception("watching the ranks failed")
            self.end(f"watching the ranks failed: {type(error).__name__}: {error}")
        finally:
            self._selector.close()

    def _look_until_the_end(self) -> None:
        looked_s = time.monotonic()
        while not self._is_over:
            events = self._selector.select(_LOOK_S)
            now = time.monotonic()
            if now - looked_s > _LAG_S:  # it was us who stood still
                self._heard_since_s = now
            looked_s = now
            for key, _ in events:
                if not self._is_over:
                    self._read(key.data, now)
            if not self._is_over:
                self._judge(now)

    def _read(self, member: Member, now: float) -> None:
        try:
            data = member.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(member.sock)
            self.end(f"{member} is gone")
            return
        member.heard_s = now
        try:
            for message in member.reader.feed(data):
                self._hear(member, message)
        except (ValueError, msgspec.MsgspecError) as error:
            self.end(f"{member} does not speak our language: {error}")

    def _hear(self, member: Member, message: FromRank) -> None:
        if isinstance(message, Pulse):
            if member.pulse is None and message.machine == self.machine:
                with contextlib.suppress(OSError):
                    member.process = os.pidfd_open(message.pid)
            member.pulse = message
        elif isinstance(message, Sampled):
            self.results.put(message)
            return
        elif isinstance(message, Passed):
            self._busy_s[message.stage] = message.busy_s
            return
        elif isinstance(message, Failed):
            self.end(f"{member}: {message.text}")
        else:
            member.loaded = message
            log.info("%s has loaded its share in %.1f s", member, message.seconds)
        self.wake()

    # --- the end --------------------------------------------------------------------------------

    def end(self, why: str) -> None:
        """Kill what is left of the gang and tell the reason, once. Any thread."""
        with self._ending:
            if self._is_over:
                return
            self._is_over = True
            self.failure = failure = GangFailed(why)
        log.critical("the gang ends: %s", why)
        self._kill()
        self._disconnect()
        self.wake()
        self.results.put(failure)
        if self._on_failure is not None:
            self._on_failure(failure)

    def close(self) -> None:
        """End the gang in peace: ranks go by themselves when their connection closes, or are killed."""
        with self._ending:
            if self._is_over:
                return
            self._is_over = True
        self._disconnect()
        deadline = time.monotonic() + CLOSING_S
        with selectors.DefaultSelector() as alive:
            for member in self.members:
                if member.process >= 0:
                    alive.register(member.process, selectors.EVENT_READ)
            while alive.get_map() and (left_s := deadline - time.monotonic()) > 0:
                for key, _ in alive.select(left_s):
                    alive.unregister(key.fd)
        self._kill()

    def _disconnect(self) -> None:
        for member in self.members:
            with contextlib.suppress(OSError):
                member.sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSING_S)
        for member in self.members:
            member.sock.close()
        for function in self._on_end:
            function()

    def _kill(self) -> None:
        for member in self.members:
            if member.process >= 0:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(member.process, signal.SIGKILL)
                os.close(member.process)
                member.process = -1


def _state(member: Member, now: float) -> RankState:
    pulse, silence_s = member.pulse, now - member.heard_s
    if pulse is None:
        return RankState(rank=member.rank, host="", pid=0, step=0, age_s=silence_s)
    is_late = pulse.age_s > 0 or silence_s > _IDLE_S
    age_s = pulse.age_s + silence_s if is_late else 0.0
    return RankState(rank=member.rank, host=pulse.host, pid=pulse.pid, step=pulse.step, age_s=age_s)
