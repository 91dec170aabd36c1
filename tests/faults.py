"""A replica without an engine: the real protocol over a real socket, scripted tokens, faults on demand.

Benchmarks run it as a process of its own: `python -m tests.faults unix:/path --step-ms 50`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import cast

from serving import wire
from serving.gateway.connection import parse_endpoint
from serving.types import NO_LOGPROBS, ModelCard, RankState
from tests.scripted import Row, Script, make_card

__all__ = ["SECRET", "FakeReplica", "make_card"]

SECRET = "5ec2e7"


class FakeReplica:
    """One replica. Every fault is a public attribute or method; what it saw is in public lists."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str = "replica-0",
        card: ModelCard | None = None,
        secret: str = SECRET,
        assets: dict[str, bytes] | None = None,
        max_rows: int = 64,
        max_waiting: int = 0,
        step_s: float = 0.001,
        beat_s: float = 0.02,
        version: int = wire.PROTOCOL_VERSION,
    ) -> None:
        self.endpoint = endpoint
        self.name = name
        self.assets = assets or {}
        self.card = card or make_card(assets=self.assets)
        self.secret = bytes.fromhex(secret)
        self.max_rows = max_rows  # in a step
        self.max_waiting = max_waiting  # permits beyond them
        self.step_s = step_s
        self.beat_s = beat_s
        self.version = version
        self.epoch = 1
        self.state = "ready"
        self.is_frozen = False  # as by SIGSTOP: neither beats nor steps, sockets open
        self.is_stuck = False  # beats go on, the step does not end
        self.is_silent = False  # steps go on, beats do not
        self.forgets_ends = False  # rows that are over: the last token was sent, the word that it was the last is not
        self.poison: int | None = None  # a prompt that contains this id brings the step down
        self.cut_at: int | None = None  # break all connections once `num_tokens` has reached it
        self.cut_inside_frame = False
        self.down_s = 0.0  # how long after a cut until it listens again
        self.reject_with: wire.Reject | None = None  # answer to every submit (its handle is replaced)
        self.corrupt: Callable[[wire.Step], wire.Step | bytes] | None = None  # applied to the next step only
        self.submits: list[wire.Submit] = []
        self.cancels: list[tuple[float, int]] = []
        self.violations: list[str] = []
        self.num_steps = 0
        self.num_tokens = 0
        self.num_connections = 0
        self.num_cuts = 0
        self._stuck_since = 0.0
        self.peers: list[Peer] = []
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.wake = asyncio.Event()

    # --- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self._listen()
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._beat_for_ever())]

    async def stop(self) -> None:
        self.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._unlink()

    async def __aenter__(self) -> FakeReplica:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        target = parse_endpoint(self.endpoint)
        if isinstance(target, str):
            self._unlink()
            self._server = await loop.create_unix_server(lambda: Peer(self), target)
        else:
            self._server = await loop.create_server(lambda: Peer(self), *target)

    def _unlink(self) -> None:
        target = parse_endpoint(self.endpoint)
        if isinstance(target, str):
            Path(target).unlink(missing_ok=True)

    # --- faults -----------------------------------------------------------------------------------

    def kill(self) -> None:
        """As by SIGKILL: every connection breaks and nobody listens."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.break_connections()

    def break_connections(self) -> None:
        self.num_cuts += 1
        self.epoch += 1
        for peer in self.peers:
            peer.transport.abort()
        self.peers.clear()

    async def restart(self) -> None:
        """Listens again after `kill`, as another process would."""
        if self._server is None:
            await self._listen()

    def freeze(self) -> None:
        self.is_frozen = True
        for peer in self.peers:
            peer.transport.pause_reading()

    def thaw(self) -> None:
        """Wakes up as a zombie does: goes on writing before it has read that nobody listens."""
        self.is_frozen = False
        self.step()
        for peer in self.peers:
            peer.transport.resume_reading()

    def stick(self) -> None:
        self._stuck_since = time.monotonic()
        self.is_stuck = True

    def mute(self) -> None:
        """Neither beats nor steps are heard any more, yet everything is read and computed."""
        self.is_silent = self.is_stuck = True
        self._stuck_since = time.monotonic()

    # --- engine -----------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return sum(len(peer.rows) for peer in self.peers)

    def _is_halted(self) -> bool:
        return self.is_frozen or self.is_stuck

    async def _run(self) -> None:
        due = time.monotonic()
        while True:
            if not self.num_rows or self._is_halted():
                self.wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), 0.02)
                due = time.monotonic()
                continue
            due = max(due + self.step_s, time.monotonic() - self.step_s)
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            if self._is_halted():
                continue
            if self.step() and self.down_s:
                if self._server is not None:
                    self._server.close()
                    self._server = None
                await asyncio.sleep(self.down_s)
                await self._listen()

    def step(self) -> bool:
        """One token for every row; whether this step broke the connections."""
        self.num_steps += 1
        if self.poison is not None and any(
            self.poison in wire.unpack_ids(row.submit.prompt_ids) for peer in self.peers for row in peer.running
        ):
            for peer in self.peers:  # the scheduler's word is out before the step kills the process
                peer.send(wire.Step(self.num_steps, b"", [], peer.admit(), [], peer.granted))
            self.break_connections()
            return True
        for peer in list(self.peers):
            frame = self._step_of(peer)
            if self.corrupt is not None:
                bad, self.corrupt = self.corrupt(frame), None
                peer.transport.write(bad if isinstance(bad, bytes) else wire.encode(bad))
                continue
            if self.cut_at is not None and self.num_tokens >= self.cut_at:
                data = wire.encode(frame)
                peer.transport.write(data[: len(data) // 2] if self.cut_inside_frame else data)
                self.cut_at = None
                self.break_connections()
                return True
            peer.send(frame)
        return False

    def _step_of(self, peer: Peer) -> wire.Step:
        pairs = array("I")
        finished: list[tuple[int, int, int]] = []
        logprobs: list[tuple[int, bytes]] = []
        admitted = peer.admit()
        for row in peer.running:
            if self.cut_at is not None and self.num_tokens >= self.cut_at:
                break
            token = row.script.peek()
            if row.submit.sampling.logprobs != NO_LOGPROBS:
                logprobs.append((len(pairs) // 2, row.script.logprobs()))
            row.script.accept(token)
            row.num_tokens += 1
            self.num_tokens += 1
            pairs.append(row.handle)
            pairs.append(token)
            end = row.finish(token, self.card)
            if end is not None:
                if not self.forgets_ends:
                    finished.append(end)
                del peer.rows[row.handle]
        return wire.Step(self.num_steps, pairs.tobytes(), finished, admitted, logprobs, peer.grant())

    # --- beats ------------------------------------------------------------------------------------

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.beat_s)
            if not self.is_frozen and not self.is_silent:
                for peer in self.peers:
                    peer.beat()

    def step_age_s(self) -> float:
        return time.monotonic() - self._stuck_since if self.is_stuck else 0.0


class Peer(asyncio.Protocol):
    """One gateway's connection, as the replica sees it."""

    def __init__(self, replica: FakeReplica) -> None:
        self.replica = replica
        self.rows: dict[int, Row] = {}
        self.num_submits = 0
        self.granted = 0  # as last announced
        self._seq = 0
        self._hello: wire.Hello | None = None
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self._reader = wire.FrameReader()
        self.is_open = False

    @property
    def running(self) -> list[Row]:
        return list(self.rows.values())[: self.replica.max_rows]

    def admit(self) -> list[tuple[int, int]]:
        new = [row for row in self.running if not row.was_admitted]
        for row in new:
            row.was_admitted = True
        return [(row.handle, row.num_prompt_tokens // 16 * 16) for row in new]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.rows.clear()
        if self in self.replica.peers:
            self.replica.peers.remove(self)

    def data_received(self, data: bytes) -> None:
        for body in self._reader.feed(data):
            self._receive(wire.decode_from_gateway(body))

    def _receive(self, message: wire.FromGateway) -> None:
        replica = self.replica
        if isinstance(message, wire.Hello):
            self._hello = message
            mac = wire.prove(replica.secret, "replica", message.nonce, self._nonce)
            self.send(wire.HelloReply(replica.version, replica.card, replica.epoch, replica.name, self._nonce, mac))
        elif isinstance(message, wire.Prove):
            assert self._hello is not None
            if not wire.is_proof(replica.secret, "gateway", self._hello.nonce, self._nonce, message.mac):
                self.transport.abort()
                return
            replica.num_connections += 1
            replica.peers.append(self)
            self.is_open = True
            self.beat()
        elif not self.is_open:
            replica.violations.append(f"{type(message).__name__} before prove")
        elif isinstance(message, wire.Submit):
            self._submit(message)
        elif isinstance(message, wire.Cancel):
            for handle in message.handles:
                replica.cancels.append((time.monotonic(), handle))
                self.rows.pop(handle, None)
        elif isinstance(message, wire.AssetRequest):
            asset = replica.assets.get(message.name, b"")
            self.send(wire.Asset(message.name, hashlib.sha256(asset).hexdigest(), asset))

    def _submit(self, submit: wire.Submit) -> None:
        replica = self.replica
        replica.submits.append(submit)
        if submit.handle != self.num_submits:
            replica.violations.append(f"handle {submit.handle}, expected {self.num_submits}")
        self.num_submits += 1
        if self.num_submits > self.granted:
            replica.violations.append(f"submit {self.num_submits} with {self.granted} granted")
        if replica.reject_with is not None:
            reject = replica.reject_with
            self.send(wire.Reject(submit.handle, reject.code, reject.message, reject.param))
            return
        script = Script(submit.prompt_ids, submit.sampling, replica.card.tokenizer_size)
        resumed = wire.unpack_ids(submit.resume_ids)
        for token in resumed:
            if token != script.peek():
                replica.violations.append(f"resume_ids of {submit.request_id} hold {token}: never said")
            script.accept(token)
        self.rows[submit.handle] = Row(submit.handle, submit, script, len(resumed))
        replica.wake.set()

    def grant(self) -> int:
        """Cumulative permits: what was sent, plus what is still free."""
        free = self.replica.max_rows + self.replica.max_waiting - self.replica.num_rows
        self.granted = max(self.granted, self.num_submits + max(free, 0) // len(self.replica.peers))
        return self.granted

    def beat(self) -> None:
        replica = self.replica
        self._seq += 1
        running = min(len(self.rows), replica.max_rows)
        self.send(
            wire.Beat(
                seq=self._seq,
                state=replica.state,
                step=replica.num_steps,
                step_age_s=replica.step_age_s(),
                announced_s=max(replica.step_s, 0.01),
                num_running=running,
                num_waiting=len(self.rows) - running,
                blocks_used=len(self.rows),
                blocks_total=1000,
                granted=self.grant(),
                ranks=[RankState(rank=0, host="localhost", pid=os.getpid(), step=replica.num_steps, age_s=0.0)],
            )
        )

    def send(self, message: wire.Message) -> None:
        self.transport.write(wire.encode(message))


async def _serve(options: argparse.Namespace) -> None:
    assets = {path.name: path.read_bytes() for path in map(Path, options.asset)}
    replica = FakeReplica(
        options.endpoint,
        secret=options.secret,
        assets=assets,
        card=make_card(
            model=options.model,
            assets=assets,
            tokenizer_size=options.tokenizer_size,
            max_model_len=options.max_model_len,
        ),
        max_rows=options.max_rows,
        step_s=options.step_ms / 1000,
        beat_s=0.1,
    )
    async with replica:
        await asyncio.Event().wait()


def main() -> None:
    """A replica for benchmarks, until it is killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("--secret", default=SECRET)
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--max-rows", type=int, default=1024)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokenizer-size", type=int, default=300, help="ids said are below this")
    parser.add_argument("--max-model-len", type=int, default=1 << 20)
    parser.add_argument("--asset", action="append", default=[], help="a file of the model card; may be repeated")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
