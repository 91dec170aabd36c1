"""A blocking gateway for tests: one connection to a replica, spoken by hand."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from types import TracebackType

from serving import wire
from serving.types import SamplingParams


class Client:
    """Connects, shakes hands and collects what arrives."""

    def __init__(self, address: str, secret: bytes = b"secret", *, shake_hands: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(address.removeprefix("unix:"))
        self.reader = wire.FrameReader()
        self.inbox: list[wire.FromReplica] = []
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.rejects: dict[int, wire.Reject] = {}
        self.beats: list[wire.Beat] = []
        self.granted = 0
        if shake_hands:
            self.shake_hands(secret)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sock.close()

    def shake_hands(self, secret: bytes) -> None:
        nonce = os.urandom(wire.NONCE_BYTES)
        self.send(wire.Hello(wire.PROTOCOL_VERSION, "test", nonce))
        reply = self.receive()
        assert isinstance(reply, wire.HelloReply)
        assert wire.is_proof(secret, "replica", nonce, reply.nonce, reply.mac)
        self.card, self.epoch = reply.card, reply.epoch
        self.send(wire.Prove(wire.prove(secret, "gateway", nonce, reply.nonce)))
        self.until(lambda: self.granted > 0)

    def send(self, message: wire.Message) -> None:
        self.sock.sendall(wire.encode(message))

    def receive(self) -> wire.FromReplica:
        """The next message. Raises ConnectionError at the end of the stream."""
        while not self.inbox:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("closed by the replica")
            self.inbox += [wire.decode_from_replica(body) for body in self.reader.feed(data)]
        return self.inbox.pop(0)

    def take(self) -> None:
        """Receive one message and note what it says."""
        message = self.receive()
        if isinstance(message, wire.Step):
            for handle, token in wire.PAIR.iter_unpack(message.tokens):
                self.tokens.setdefault(handle, []).append(token)
            self.finished.update({handle: reason for handle, reason, _ in message.finished})
            self.cached.update(dict(message.admitted))
            self.granted = message.granted
        elif isinstance(message, wire.Beat):
            self.beats.append(message)
            self.granted = message.granted
        elif isinstance(message, wire.Reject):
            self.rejects[message.handle] = message

    def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            self.take()

    def submit(self, handle: int, prompt: list[int], *, resume: tuple[int, ...] = (), **fields: object) -> None:
        extra = {key: fields.pop(key) for key in ("is_keyed", "request_id", "priority", "salt") if key in fields}
        sampling = SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | fields))
        request_id = extra.pop("request_id", f"request-{handle}")
        self.send(wire.Submit(handle, request_id, wire.pack_ids(prompt), wire.pack_ids(resume), sampling, **extra))

    def completion(self, handle: int, prompt: list[int], **fields: object) -> list[int]:
        self.submit(handle, prompt, **fields)
        self.until(lambda: handle in self.finished)
        return self.tokens[handle]
