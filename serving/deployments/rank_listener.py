"""Where rank 0 lets the other ranks of its gang in.

    rank 0                                     rank r
    nonce (32 bytes)                      ->
                                          <-   r (u32), nonce (32), HMAC over both (32)
    HMAC over both (32)                   ->

The role that a proof names holds the rank and the gang: a proof for another place or start is none. The
secret itself is never sent, and strangers learn nothing (C22). Imports no ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from serving.errors import ModelLoadError
from serving.wire import is_proof, prove

NONCE_BYTES: Final = 32
GREETING_S: Final = 10.0  # how long a connection may take to introduce itself
MAX_STRANGERS: Final = 64  # beside the ranks that are missing
GONE_MS: Final = 10_000  # a connection whose bytes nobody acknowledges for so long is at its end
_INTRODUCTION: Final = struct.Struct(f"<I{NONCE_BYTES}s32s")
_LOOK_S: Final = 0.2


@dataclasses.dataclass(slots=True)
class _Stranger:
    nonce: bytes
    came_s: float
    said: bytes = b""


class RankListener:
    """Rank 0's socket, open until every rank is in."""

    def __init__(self, host: str, gang: str, secret: bytes) -> None:
        """Listens on a free port of `host` alone. gang: unique per start. Raises OSError."""
        self._gang = gang
        self._secret = secret
        self._listener = socket.create_server((host, 0), backlog=MAX_STRANGERS)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    def admit(self, num_ranks: int, deadline_s: float, look: Callable[[set[int]], None]) -> list[socket.socket]:
        """Connections to ranks 1 … num_ranks, in that order.

        deadline_s: on the monotonic clock. look: called a few times a second with the missing ranks;
            raises when it knows that one will never come.
        Raises ModelLoadError naming the missing ranks.
        """
        admitted: dict[int, socket.socket] = {}
        strangers: dict[socket.socket, _Stranger] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                while missing := set(range(1, num_ranks + 1)) - admitted.keys():
                    look(missing)
                    if time.monotonic() > deadline_s:
                        names = ", ".join(map(str, sorted(missing)))
                        raise ModelLoadError(f"rank {names} of {num_ranks + 1} did not connect in time")
                    for key, _ in selector.select(_LOOK_S):
                        if key.fileobj is self._listener:
                            self._meet(selector, strangers, MAX_STRANGERS + len(missing))
                        elif isinstance(key.fileobj, socket.socket):
                            self._hear(key.fileobj, selector, strangers, missing, admitted)
                    for sock in [s for s, one in strangers.items() if time.monotonic() - one.came_s > GREETING_S]:
                        _part(sock, selector, strangers)
            except BaseException:
                for sock in admitted.values():
                    sock.close()
                raise
            finally:
                for sock in list(strangers):
                    _part(sock, selector, strangers)
        return [admitted[rank] for rank in sorted(admitted)]

    def close(self) -> None:
        self._listener.close()

    def _meet(
        self, selector: selectors.BaseSelector, strangers: dict[socket.socket, _Stranger], max_num_strangers: int
    ) -> None:
        with contextlib.suppress(OSError):  # gone again
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            if len(strangers) >= max_num_strangers:
                _part(next(iter(strangers)), selector, strangers)
            strangers[sock] = stranger = _Stranger(secrets.token_bytes(NONCE_BYTES), time.monotonic())
            selector.register(sock, selectors.EVENT_READ)
            sock.send(stranger.nonce)  # the first bytes of a connection: there is room

    def _hear(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        strangers: dict[socket.socket, _Stranger],
        missing: set[int],
        admitted: dict[int, socket.socket],
    ) -> None:
        if sock not in strangers:  # parted with since the selector looked
            return
        stranger = strangers[sock]
        try:
            said = sock.recv(_INTRODUCTION.size - len(stranger.said))
        except BlockingIOError:
            return
        except OSError:
            said = b""
        stranger.said += said
        if said and len(stranger.said) < _INTRODUCTION.size:
            return
        if len(stranger.said) == _INTRODUCTION.size:
            rank, nonce, proof = _INTRODUCTION.unpack(stranger.said)
            is_known = is_proof(self._secret, _role(rank, self._gang), stranger.nonce, nonce, proof)
            if is_known and rank in missing and rank not in admitted:
                selector.unregister(sock)
                del strangers[sock]
                try:
                    sock.setblocking(True)
                    _prepare(sock)
                    sock.sendall(prove(self._secret, _role(0, self._gang), stranger.nonce, nonce))
                except OSError:
                    sock.close()
                else:
                    admitted[rank] = sock
                return
        _part(sock, selector, strangers)


def introduce(address: tuple[str, int], rank: int, gang: str, secret: bytes) -> socket.socket:
    """Rank `rank`'s connection to rank 0. Raises OSError; PermissionError when either side does not know the secret."""
    sock = socket.create_connection(address, timeout=GREETING_S)
    try:
        theirs = _exactly(sock, NONCE_BYTES)
        ours = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(_INTRODUCTION.pack(rank, ours, prove(secret, _role(rank, gang), theirs, ours)))
        if not is_proof(secret, _role(0, gang), theirs, ours, _exactly(sock, 32)):
            raise PermissionError(f"who listens on {address[0]}:{address[1]} does not know the secret")
        sock.settimeout(None)
        _prepare(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _role(rank: int, gang: str) -> str:
    return f"rank {rank} of {gang}"


def _prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a plan must not wait for the one before
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_MS)  # a lost host sends no end


def _part(sock: socket.socket, selector: selectors.BaseSelector, strangers: dict[socket.socket, _Stranger]) -> None:
    selector.unregister(sock)
    del strangers[sock]
    sock.close()


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise PermissionError("rank 0 closed the connection: this rank is not expected or does not know the secret")
        data += more
    return data
