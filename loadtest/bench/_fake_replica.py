"""Replicas without an engine that speak the engine protocol at full rate: one token per row and step, packed.

A process of its own. On SIGTERM it says in one line when it sent each step and in which step each row began, so
that a client which knows its row's seed knows when each of its tokens left.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import uvloop

from serving import wire
from serving.types import FinishReason, ModelCard, RankState, StepRecord

BEAT_S = 0.1


class FakeReplicaSettings(msgspec.Struct, frozen=True, kw_only=True):
    paths: list[str]  # a Unix socket per replica; their steps are staggered evenly
    secret: str  # hex
    card: ModelCard
    assets: dict[str, str]  # of the card: name -> path
    ids: list[int]  # tokens to say
    step_s: float
    max_rows: int  # per replica


class Sent(msgspec.Struct, kw_only=True):
    """When tokens left. Times are of the monotonic clock, which all processes of a machine share."""

    steps: list[list[float]]  # per replica: when step k was written
    begun: dict[int, tuple[int, int]]  # seed of a row -> (replica, its first step)


class Replica:
    """One replica with any number of gateways."""

    def __init__(self, number: int, settings: FakeReplicaSettings, sent: Sent) -> None:
        self.number = number
        self.settings = settings
        self.assets = {name: Path(path).read_bytes() for name, path in settings.assets.items()}
        self.gateways: set[GatewayPeer] = set()
        self.times = sent.steps[number]
        self.begun = sent.begun
        self._ids = np.array(settings.ids, np.uint32)

    async def run(self) -> None:
        """Step on a fixed grid of time, and beat between steps."""
        settings = self.settings
        phase = self.number * settings.step_s / len(settings.paths)
        due = time.monotonic() // settings.step_s * settings.step_s + phase
        beat_due = due
        while True:
            due += settings.step_s
            await asyncio.sleep(due - time.monotonic())
            is_beat = due >= beat_due
            if is_beat:
                beat_due = due + BEAT_S
            step = len(self.times)
            self.times.append(time.monotonic())
            for gateway in self.gateways:
                if is_beat:  # ahead of the step, as a true replica sends it
                    gateway.beat(step)
                gateway.step(step)

    def tokens(self, handles: np.ndarray, step: int) -> bytes:
        """Packed (handle, token) pairs of one step."""
        pairs = np.empty((len(handles), 2), np.uint32)
        pairs[:, 0] = handles
        pairs[:, 1] = self._ids[(handles + step) % len(self._ids)]
        return pairs.tobytes()


class GatewayPeer(asyncio.Protocol):
    """One gateway's connection."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._reader = wire.FrameReader()
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self._hello: wire.Hello | None = None
        self._rows: dict[int, int] = {}  # handle -> its last step
        self._ends: dict[int, list[int]] = {}  # step -> handles that end with it
        self._new: list[wire.Submit] = []
        self._handles = np.empty(0, np.uint32)  # of _rows; rebuilt when they change
        self._is_changed = False
        self._num_submits = 0
        self._seq = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._replica.gateways.discard(self)

    def data_received(self, data: bytes) -> None:
        for body in self._reader.feed(data):
            self._receive(wire.decode_from_gateway(body))

    def _receive(self, message: wire.FromGateway) -> None:
        settings = self._replica.settings
        secret = bytes.fromhex(settings.secret)
        match message:
            case wire.Hello():
                self._hello = message
                mac = wire.prove(secret, "replica", message.nonce, self._nonce)
                name = f"fake-{self._replica.number}"
                self._send(wire.HelloReply(wire.PROTOCOL_VERSION, settings.card, 1, name, self._nonce, mac))
            case wire.Prove(mac=mac):
                nonce = self._hello.nonce if self._hello is not None else b""
                if not wire.is_proof(secret, "gateway", nonce, self._nonce, mac):
                    self._transport.abort()
                    return
                self._replica.gateways.add(self)
                self.beat(0)
            case wire.Submit():
                self._num_submits += 1
                self._new.append(message)
            case wire.Cancel(handles=handles):
                for handle in handles:
                    self._is_changed |= self._rows.pop(handle, None) is not None
                self._new = [submit for submit in self._new if submit.handle not in handles]
            case wire.AssetRequest(name=name):
                data = self._replica.assets.get(name, b"")
                self._send(wire.Asset(name, hashlib.sha256(data).hexdigest(), data))

    def step(self, number: int) -> None:
        """One token for every row."""
        admitted = [(submit.handle, 0) for submit in self._new]
        for submit in self._new:
            last = number + submit.sampling.max_tokens - len(submit.resume_ids) // 4 - 1
            self._rows[submit.handle] = last
            self._ends.setdefault(last, []).append(submit.handle)
            self._replica.begun[submit.sampling.seed] = (self._replica.number, number)
        if self._new or self._is_changed:
            self._handles = np.fromiter(self._rows, np.uint32, len(self._rows))
            self._is_changed = False
            self._new = []
        if not len(self._handles):
            return
        ends = [handle for handle in self._ends.pop(number, ()) if self._rows.pop(handle, None) is not None]
        finished = [(handle, int(FinishReason.LENGTH), -1) for handle in ends]
        tokens = self._replica.tokens(self._handles, number)
        self._is_changed = bool(ends)
        record = StepRecord(
            started_s=time.monotonic(),
            duration_s=0.0,
            announced_s=0.02,
            ideal_s=0.01,
            num_rows=len(self._handles),
            num_prefill_tokens=0,
            num_decode_tokens=len(self._handles),
            num_waiting=0,
            blocks_used=0,
        )
        self._send(wire.Step(number, tokens, finished, admitted, [], self._granted(), record))

    def beat(self, step: int) -> None:
        settings = self._replica.settings
        self._seq += 1
        self._send(
            wire.Beat(
                seq=self._seq,
                state="ready",
                step=step,
                step_age_s=0.0,
                announced_s=settings.step_s,
                num_running=len(self._rows),
                num_waiting=0,
                blocks_used=len(self._rows),
                blocks_total=settings.max_rows,
                granted=self._granted(),
                ranks=[RankState(rank=0, host="localhost", pid=os.getpid(), step=step, age_s=0.0)],
            )
        )

    def _granted(self) -> int:
        free = self._replica.settings.max_rows - len(self._rows) - len(self._new)
        return self._num_submits + max(free, 0)

    def _send(self, message: wire.Message) -> None:
        self._transport.write(wire.encode(message))


async def serve(settings: FakeReplicaSettings) -> Sent:
    """Run until SIGTERM."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    sent = Sent(steps=[[] for _ in settings.paths], begun={})
    tasks = []
    for number, path in enumerate(settings.paths):
        replica = Replica(number, settings, sent)
        await loop.create_unix_server(lambda replica=replica: GatewayPeer(replica), path)  # type: ignore[misc]
        tasks.append(asyncio.create_task(replica.run()))
    waiting = asyncio.create_task(stopped.wait())
    done, _ = await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return sent


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=FakeReplicaSettings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sent = runner.run(serve(settings))
    print(msgspec.json.encode(sent).decode(), flush=True)


if __name__ == "__main__":
    main()
