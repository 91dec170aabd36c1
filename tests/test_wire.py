"""The engine protocol: every message survives every way of cutting the stream, garbage never does."""

from __future__ import annotations

import random
import struct
import types
import typing
from typing import Any

import msgspec
import pytest

from serving import wire
from serving.types import ModelCard, ReplicaStats, SamplingParams
from serving.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    FrameReader,
    Message,
    WireError,
    decode_from_gateway,
    decode_from_replica,
    encode,
    is_proof,
    pack_ids,
    prove,
    unpack_ids,
    unpack_logprobs,
)

MESSAGES: list[type[Message]] = Message.__subclasses__()
FROM_GATEWAY = typing.get_args(wire.FromGateway)
FROM_REPLICA = typing.get_args(wire.FromReplica)

StructT = typing.TypeVar("StructT", bound=msgspec.Struct)


def decode(kind: type[Message], body: bytes) -> Message:
    return decode_from_gateway(body) if kind in FROM_GATEWAY else decode_from_replica(body)


def random_value(rng: random.Random, annotation: Any) -> Any:
    """Any value of the annotated type, structs included."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return random_value(rng, rng.choice(arguments))
    if origin is list:
        return [random_value(rng, arguments[0]) for _ in range(rng.randrange(4))]
    if origin is dict:
        return {random_value(rng, arguments[0]): random_value(rng, arguments[1]) for _ in range(rng.randrange(4))}
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(random_value(rng, arguments[0]) for _ in range(rng.randrange(4)))
    if origin is tuple:
        return tuple(random_value(rng, argument) for argument in arguments)
    if annotation is int:
        return rng.choice([0, 1, 127, 128, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
    if annotation is float:
        return rng.choice([0.0, -1.5, 1e300, 5e-324, float("inf")])
    if annotation is bool:
        return rng.random() < 0.5
    if annotation is str:
        return rng.choice(["", "x", "naïve \N{SNOWMAN} \N{ROCKET}", "\0", "a" * 300])
    if annotation is bytes:
        return rng.randbytes(rng.choice([0, 1, 8, 300]))
    if annotation is type(None):
        return None
    return random_struct(rng, annotation)


def random_struct(rng: random.Random, kind: type[StructT]) -> StructT:
    hints = typing.get_type_hints(kind)
    return kind(**{name: random_value(rng, hints[name]) for name in kind.__struct_fields__})


def test_every_message_belongs_to_one_direction() -> None:
    assert set(MESSAGES) == {*FROM_GATEWAY, *FROM_REPLICA}
    assert not {*FROM_GATEWAY} & {*FROM_REPLICA}
    tags = [kind.__struct_config__.tag for kind in MESSAGES]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", MESSAGES)
def test_round_trip(kind: type[Message]) -> None:
    rng = random.Random(kind.__name__)
    for _ in range(100):
        message = random_struct(rng, kind)
        (body,) = FrameReader().feed(encode(message))
        assert decode(kind, body) == message
        assert decode(kind, memoryview(body).toreadonly()) == message  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MESSAGES)
def test_the_other_side_does_not_understand_it(kind: type[Message]) -> None:
    (body,) = FrameReader().feed(encode(random_struct(random.Random(1), kind)))
    other = decode_from_replica if kind in FROM_GATEWAY else decode_from_gateway
    with pytest.raises(WireError):
        other(body)


# --- framing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_cut_anywhere_yields_the_same_messages(seed: int) -> None:
    rng = random.Random(seed)
    messages = [random_struct(rng, rng.choice(FROM_REPLICA)) for _ in range(30)]
    stream = b"".join(encode(message) for message in messages)
    reader = FrameReader()
    received: list[Message] = []
    at = 0
    while at < len(stream):
        size = rng.choice([1, 2, 3, 5, 100, 5000])
        received += [decode_from_replica(body) for body in reader.feed(stream[at : at + size])]
        at += size
    assert received == messages
    assert list(reader.feed(b"")) == []


def test_byte_by_byte_a_frame_appears_with_its_last_byte() -> None:
    frame = encode(wire.Cancel([1, 2, 3]))
    reader = FrameReader()
    assert [list(reader.feed(frame[i : i + 1])) for i in range(len(frame) - 1)] == [[]] * (len(frame) - 1)
    assert list(reader.feed(frame[-1:])) == [frame[HEADER.size :]]


def test_an_empty_frame_is_a_frame_but_no_message() -> None:
    assert list(FrameReader().feed(HEADER.pack(0))) == [b""]
    with pytest.raises(WireError):
        decode_from_gateway(b"")


def test_an_announced_oversize_is_refused_before_its_body_arrives() -> None:
    reader = FrameReader(limit=1000)
    assert [len(body) for body in reader.feed(HEADER.pack(1000) + bytes(1000))] == [1000]
    with pytest.raises(WireError, match="frame of 1001 bytes exceeds the limit of 1000"):
        reader.feed(HEADER.pack(1001))


def test_an_oversize_behind_a_whole_frame_is_refused_as_well() -> None:
    with pytest.raises(WireError, match="4294967295"):
        FrameReader().feed(HEADER.pack(3) + b"abc" + b"\xff\xff\xff\xff")


def test_what_would_not_be_accepted_is_not_sent() -> None:
    room = MAX_FRAME_BYTES - len(encode(wire.Asset("a", "b", bytes(70_000)))) + HEADER.size + 70_000
    (body,) = FrameReader().feed(encode(wire.Asset("a", "b", bytes(room))))
    assert len(body) == MAX_FRAME_BYTES
    with pytest.raises(WireError, match=f"frame of {MAX_FRAME_BYTES + 1} bytes"):
        encode(wire.Asset("a", "b", bytes(room + 1)))


# --- garbage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [decode_from_gateway, decode_from_replica])
def test_garbage_is_a_wire_error(decoder: Any) -> None:
    rng = random.Random(5)
    for _ in range(3000):
        with pytest.raises(WireError):
            decoder(b"\x81" + rng.randbytes(rng.randrange(40)))  # a map is never a message
    deep = b"\x91" * 200_000
    for body in (b"\xc0", b"\x90", b"\x91\x7f", b"\x92\x01", b"\xdd\xff\xff\xff\xff", deep):
        with pytest.raises(WireError):
            decoder(body)


@pytest.mark.parametrize("kind", MESSAGES)
def test_corrupted_messages_never_escape_as_another_error(kind: type[Message]) -> None:
    """One byte changed, or the end cut off: a message or a WireError, nothing else."""
    rng = random.Random(kind.__name__)
    refused = 0
    for _ in range(400):
        (body,) = FrameReader().feed(encode(random_struct(rng, kind)))
        corrupted = bytearray(body)
        if rng.random() < 0.5:
            corrupted[rng.randrange(len(corrupted))] = rng.randrange(256)
        else:
            del corrupted[rng.randrange(len(corrupted)) :]
        try:
            assert isinstance(decode(kind, bytes(corrupted)), Message)
        except WireError:
            refused += 1
    assert refused > 200


def test_a_deeply_nested_unknown_field_is_refused_or_ignored_but_never_fatal() -> None:
    body = b"\x93\x04" + b"\x90" + b"\x91" * 100_000 + b"\x90"  # Cancel([]) and a field from the future
    with pytest.raises(WireError):
        decode_from_gateway(body)


# --- versions --------------------------------------------------------------------------------


def fields_of(message: msgspec.Struct) -> list[Any]:
    """The message as the plain msgpack array that travels."""
    values: list[Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    return values


@pytest.mark.parametrize("kind", MESSAGES)
def test_fields_of_a_newer_peer_are_ignored(kind: type[Message]) -> None:
    message = random_struct(random.Random(2), kind)
    newer = msgspec.msgpack.encode([*fields_of(message), "later", {"nested": [1, None]}, 1.5])
    assert decode(kind, newer) == message


def test_fields_that_an_older_peer_does_not_know_take_their_defaults() -> None:
    """Whatever the first version had is required; every later field can be missing."""
    for kind in MESSAGES:
        message = random_struct(random.Random(3), kind)
        optional = [field for field in msgspec.structs.fields(kind) if not field.required]
        values = fields_of(message)
        for missing in range(1, len(optional) + 1):
            older = decode(kind, msgspec.msgpack.encode(values[:-missing]))
            for field in optional[-missing:]:
                default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
                assert getattr(older, field.name) == default
        required = values[: len(values) - len(optional)]
        if len(required) > 1:
            with pytest.raises(WireError):
                decode(kind, msgspec.msgpack.encode(required[:-1]))


def test_sampling_parameters_grow_at_their_end_only() -> None:
    """A submit of a newer gateway with one more parameter, and of an older one with fewer."""
    submit = random_struct(random.Random(4), wire.Submit)
    values = fields_of(submit)
    at = 1 + wire.Submit.__struct_fields__.index("sampling")
    values[at].append("parameter of the future")
    assert decode_from_gateway(msgspec.msgpack.encode(values)) == submit
    values[at] = values[at][:3]
    older = decode_from_gateway(msgspec.msgpack.encode(values))
    assert isinstance(older, wire.Submit)
    assert older.sampling == SamplingParams(
        temperature=submit.sampling.temperature, top_p=submit.sampling.top_p, top_k=submit.sampling.top_k
    )


def test_the_order_of_fields_is_fixed() -> None:
    """Appending is allowed, so only the beginnings are compared; anything else breaks peers one version apart."""
    beginnings = {
        wire.Submit: "handle request_id prompt_ids resume_ids sampling priority salt is_keyed draft_ids adapter",
        wire.Step: "step tokens finished admitted logprobs granted",
        wire.Reject: "handle code message param",
        wire.HelloReply: "version card epoch replica nonce mac",
        wire.Beat: "seq state step step_age_s announced_s num_running num_waiting blocks_used blocks_total"
        " granted ranks tokens_per_s stats",
        ReplicaStats: "steps prefill_tokens decode_tokens preemptions prefix_queried prefix_hits blocks_evicted"
        " step_counts step_sum ratio_counts ratio_sum limit_busy_s ideal_s hardware_fraction read_bytes_s flops_s"
        " phases weights_read_bytes",
        SamplingParams: "temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty logit_bias"
        " seed choice max_tokens min_tokens ignore_eos stop_token_ids logprobs allowed_token_ids",
    }
    for kind, names in beginnings.items():
        expected = tuple(names.split())
        assert kind.__struct_fields__[: len(expected)] == expected


def test_a_card_with_unknown_keys_is_understood() -> None:
    card = random_struct(random.Random(6), ModelCard)
    encoded = msgspec.msgpack.decode(msgspec.msgpack.encode(card))
    encoded["of the future"] = [1]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(encoded), type=ModelCard) == card


# --- packed values ---------------------------------------------------------------------------


def test_token_ids_are_little_endian_int32() -> None:
    assert pack_ids([1, 256, 2**31 - 1]) == bytes.fromhex("01000000 00010000 ffffff7f")
    assert unpack_ids(pack_ids(range(1000))).tolist() == list(range(1000))
    assert unpack_ids(b"").tolist() == []
    with pytest.raises(WireError, match="7 bytes"):
        unpack_ids(bytes(7))
    with pytest.raises(OverflowError):
        pack_ids([2**31])


def test_logprobs_unpack_to_what_was_packed() -> None:
    packed = struct.pack("<fIfIf", -0.5, 7, -0.25, 2**32 - 1, -1.5)
    assert unpack_logprobs(packed) == (-0.5, [(7, -0.25), (2**32 - 1, -1.5)])
    assert unpack_logprobs(packed[:4]) == (-0.5, [])


@pytest.mark.parametrize("size", [0, 3, 5, 11, 13])
def test_logprobs_of_a_wrong_length_are_a_wire_error(size: int) -> None:
    with pytest.raises(WireError, match=f"{size} bytes"):
        unpack_logprobs(bytes(size))


def test_only_the_secret_the_role_and_both_nonces_prove() -> None:
    mac = prove(b"secret", "gateway", b"a" * 16, b"b" * 16)
    assert is_proof(b"secret", "gateway", b"a" * 16, b"b" * 16, mac)
    assert not is_proof(b"other", "gateway", b"a" * 16, b"b" * 16, mac)
    assert not is_proof(b"secret", "replica", b"a" * 16, b"b" * 16, mac)
    assert not is_proof(b"secret", "gateway", b"b" * 16, b"a" * 16, mac)
    assert not is_proof(b"secret", "gateway", b"a" * 16, b"b" * 16, b"")
