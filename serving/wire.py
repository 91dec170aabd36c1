"""The engine protocol (C22): framed msgpack between a gateway and a replica.

A frame is a little-endian u32 length (at most `MAX_FRAME_BYTES`) and a msgpack array whose first
element is the message's tag. Fields are only appended, so a peer one version older or newer is
understood: unknown trailing fields are ignored, missing ones take their defaults.

    gateway                                   replica
    Hello(version, gateway, nonce)      ->
                                        <-    HelloReply(version, card, epoch, nonce, mac)
    Prove(mac)                          ->
                                        <-    Beat … (grants submit permits)
    Submit(handle, …)                   ->
                                        <-    Step(tokens, …) | Reject(handle, …)
    Cancel(handles)                     ->

The shared secret is never sent: each side proves it by an HMAC over both nonces. Closing the
connection is the fence: whatever a replica computes afterwards has no reader.

Token ids travel as packed little-endian int32/uint32 bytes: msgpack lists of ints cost ten times
as much to decode.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from array import array
from collections.abc import Iterable

import msgspec

from serving.types import ModelCard, RankState, ReplicaStats, SamplingParams, StepRecord

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 << 20
HEADER = struct.Struct("<I")
NONCE_BYTES = 16
PAIR = struct.Struct("<II")  # (handle, token) of Step.tokens


class WireError(Exception):
    """The peer does not speak the protocol, or not in bounds. The connection is closed."""


class Message(msgspec.Struct, array_like=True):
    """A tagged msgpack array."""


# --- gateway -> replica ---------------------------------------------------------------------


class Hello(Message, tag=1):
    version: int
    gateway: str  # name of the gateway process, for logs and /progressz
    nonce: bytes


class Prove(Message, tag=2):
    mac: bytes


class Submit(Message, tag=3):
    """One choice. `handle` is a u32 never reused on this connection."""

    handle: int
    request_id: str
    prompt_ids: bytes  # int32[]
    resume_ids: bytes  # int32[]: output tokens already journalled (C2)
    sampling: SamplingParams
    priority: int = 0  # higher is served first and preempted last
    salt: bytes = b""  # tenant salt of the prefix cache (C8)
    is_keyed: bool = False  # runs on for 60 s when the connection ends (C22)
    draft_ids: bytes = b""  # int32[]: proposed next tokens (C5); none yet
    adapter: str = ""


class Cancel(Message, tag=4):
    handles: list[int]


class Find(Message, tag=5):
    """Take over a keyed row whose connection ended. Tokens from `position` on follow as Steps."""

    handle: int
    request_id: str
    choice: int
    position: int  # number of output tokens already journalled


class AssetRequest(Message, tag=6):
    name: str


# --- replica -> gateway ---------------------------------------------------------------------


class HelloReply(Message, tag=65):
    version: int
    card: ModelCard
    epoch: int  # changes with every start of the replica
    replica: str
    nonce: bytes
    mac: bytes


class Step(Message, tag=66):
    """Everything one engine step produced for this connection.

    tokens: packed `PAIR`s in row order; a handle may occur several times (speculation).
    finished: (handle, FinishReason, stop token id or -1). The last token came before or with it.
    admitted: (handle, cached_tokens), once per submit, not later than its first token.
    logprobs: (index into tokens, packed entries): f32 logprob of the sampled token, then
        (u32 id, f32 logprob) of the alternatives, best first.
    granted: as in Beat.
    record: of the step, for the account of a request's life. None = the replica is of a version without.
    notes: (handle, Note, value), in the order in which they happened. A kind that is not known is passed over.
    """

    step: int
    tokens: bytes
    finished: list[tuple[int, int, int]]
    admitted: list[tuple[int, int]]
    logprobs: list[tuple[int, bytes]]
    granted: int
    record: StepRecord | None = None
    notes: list[tuple[int, int, int]] = []


class Reject(Message, tag=67):
    """A submit (or find) that will not run. `code` is an error code of serving/errors.py."""

    handle: int
    code: str
    message: str
    param: str | None = None


class Beat(Message, tag=68):
    """Liveness with ages on the replica's own clock (C13), and permits.

    granted: total number of submits this connection may have sent since `hello`: cumulative, so
        that a lost or repeated grant cannot exist.
    """

    seq: int
    state: str  # loading | ready | draining
    step: int  # steps completed
    step_age_s: float  # of the running step; 0 when idle
    announced_s: float  # predicted cost of the running step
    num_running: int
    num_waiting: int
    blocks_used: int
    blocks_total: int
    granted: int
    ranks: list[RankState]
    tokens_per_s: float = 0.0  # measured drain rate, for Retry-After (C15)
    stats: ReplicaStats | None = None  # in the first beat of a connection, then about twice a second


class Asset(Message, tag=69):
    """A piece of an asset: `data` belongs at `offset` of `total` bytes. Pieces arrive in order."""

    name: str
    sha256: str  # of the whole
    data: bytes
    offset: int = 0
    total: int = 0  # 0 = this is the whole


FromGateway = Hello | Prove | Submit | Cancel | Find | AssetRequest
FromReplica = HelloReply | Step | Reject | Beat | Asset

_encoder = msgspec.msgpack.Encoder()
_from_gateway: msgspec.msgpack.Decoder[FromGateway] = msgspec.msgpack.Decoder(FromGateway)
_from_replica: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)


def encode(message: Message) -> bytes:
    """The message as one frame, header included.

    Raises WireError when it exceeds MAX_FRAME_BYTES.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def decode_from_gateway(body: bytes | memoryview) -> FromGateway:
    """Raises WireError for anything that is not a known message."""
    try:
        return _from_gateway.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a gateway message: {error}") from None


def decode_from_replica(body: bytes | memoryview) -> FromReplica:
    """Raises WireError for anything that is not a known message."""
    try:
        return _from_replica.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a replica message: {error}") from None


class FrameReader:
    """Cuts a byte stream into frame bodies. Feed it what arrived, iterate over what is whole."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self.limit = limit

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Frame bodies completed by `data`.

        Raises WireError when a header announces more than the limit, before buffering the body.
        """
        self._buffer += data
        bodies = []
        at = 0
        size = len(self._buffer)
        while size - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, at)
            if length > self.limit:
                raise WireError(f"frame of {length} bytes exceeds the limit of {self.limit}")
            end = at + HEADER.size + length
            if end > size:
                break
            bodies.append(bytes(self._buffer[at + HEADER.size : end]))
            at = end
        del self._buffer[:at]
        return bodies


def pack_ids(ids: Iterable[int]) -> bytes:
    """int32 little-endian bytes of token ids."""
    return array("i", ids).tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """Inverse of `pack_ids`. Raises WireError when the length is not a multiple of four."""
    if len(data) % 4:
        raise WireError(f"token ids of {len(data)} bytes: not a multiple of 4")
    ids = array("i")
    ids.frombytes(data)
    return ids


def unpack_logprobs(data: bytes) -> tuple[float, list[tuple[int, float]]]:
    """(logprob of the sampled token, [(token id, logprob), …] best first) of a Step entry.

    Raises WireError when the length is not 4 bytes and a multiple of 8.
    """
    if len(data) % 8 != 4:
        raise WireError(f"log-probabilities of {len(data)} bytes: not 4 and a multiple of 8")
    count = (len(data) - 4) // 8
    values = struct.unpack(f"<f{'If' * count}", data)
    return values[0], list(zip(values[1::2], values[2::2], strict=True))


def prove(secret: bytes, role: str, gateway_nonce: bytes, replica_nonce: bytes) -> bytes:
    """HMAC-SHA256 by which `role` ("gateway" or "replica") shows that it knows the secret."""
    message = role.encode() + b"\0" + gateway_nonce + replica_nonce
    return hmac.new(secret, message, hashlib.sha256).digest()


def is_proof(secret: bytes, role: str, gateway_nonce: bytes, replica_nonce: bytes, mac: bytes) -> bool:
    """Whether `mac` proves the secret, in constant time."""
    return hmac.compare_digest(prove(secret, role, gateway_nonce, replica_nonce), mac)
