"""What a runtime and its supervisor tell each other: JSON lines over a socket pair.

A runtime is the process that keeps replicas alive: `serving.local` forks them, `serving.deployments.
cluster` has Ray Serve place them. The supervisor sends `Deploy`, the runtime answers with events.
The end of the stream means "stop" to the runtime, and "restart me" to the supervisor.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TypeVar

import msgspec

from serving.config import EngineSettings

MAX_LINE_BYTES = 1 << 20
DEFAULT_SERVER = "serving.engine.server:ReplicaServer"


class RuntimeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime is started with, before the model is there."""

    run_dir: str  # private (0700); sockets, secrets, Ray's session
    secret_file: str
    replicas: int
    cores: int
    drain_timeout_s: float
    control_fd: int  # inherited end of the socket pair
    log_format: str = "text"
    directory_port: int = 0  # of Serve's proxy on loopback; Ray only
    server: str = DEFAULT_SERVER  # "module:class"; a test gives another


def local_address(run_dir: Path, index: int) -> str:
    """Where replica `index` of the local runtime listens, through all its restarts."""
    return f"unix:{run_dir / f'replica-{index}.sock'}"


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas there are is decided by load. Beyond the bounds: keys of `ScalingSettings`."""

    min_replicas: int
    max_queue_delay_s: float
    scale_in_window_s: float
    scale_to_zero_after_s: float


class Deploy(msgspec.Struct, frozen=True, tag="deploy"):
    """Have this many replicas of this model; at most so many where `scaling` is given."""

    engine: EngineSettings
    replicas: int
    scaling: Scaling | None = None


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """A part of the cold start is over. who: "ray", "replica 0", …"""

    who: str
    name: str
    seconds: float


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How far a replica's weights are: of its first rank where there are several. A few times a second at most."""

    who: str
    done_bytes: int
    total_bytes: int
    seconds: float  # since the loading began


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Every replica asked for serves."""


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Something an operator should see: a replica died, was replaced, …"""

    text: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The deployment cannot work as asked; the text says what to do."""

    text: str


Event = Phase | Loading | Ready | Note | Failed

_encoder = msgspec.json.Encoder()
_events: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_deploys: msgspec.json.Decoder[Deploy] = msgspec.json.Decoder(Deploy)
_Settings = TypeVar("_Settings")


def encode_line(message: Deploy | Event) -> bytes:
    """One line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_event(line: bytes) -> Event:
    """Raises msgspec.MsgspecError."""
    return _events.decode(line)


def decode_deploy(line: bytes) -> Deploy:
    """Raises msgspec.MsgspecError."""
    return _deploys.decode(line)


class RuntimeEnd:
    """The runtime's end of the socket pair."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self._buffer = b""

    def tell(self, event: Event) -> None:
        """Send one event. A supervisor that is gone is noticed by `receive`."""
        try:
            self.socket.sendall(encode_line(event))
        except OSError:
            return

    def receive(self) -> list[Deploy] | None:
        """Orders that arrived; None when the supervisor closed its end. Blocks until either."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [decode_deploy(line) for line in lines]
