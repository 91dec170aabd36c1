"""Frames between rank 0 and the other ranks of its gang."""

from __future__ import annotations

import socket

import msgspec
import numpy as np
import pytest

from models.transports.connect import Rendezvous
from serving.config import EngineSettings
from serving.engine.rank_wire import (
    HEADER,
    MAX_FRAME_BYTES,
    Begin,
    Failed,
    Loaded,
    Message,
    Passed,
    Pulse,
    RankReader,
    Sampled,
    Setup,
    message_frame,
    plan_frame,
    receive,
)

FROM_RANK: list[Message] = [
    Pulse(True, 3, 0.25, 17, "host", "host/boot/pid"),
    Loaded(9, 1000, 4000, 1.5, {"weights": "ab", "kernels": "cpu"}),
    Failed("no such tensor"),
    Sampled(4, b"\1\0\0\0", {0: b"abcd"}, 0.01),
    Passed(1, 4, 0.02),
]
SETTINGS = EngineSettings(model_dir="m", served_model_name="s", tensor_parallel_size=2, kv_cache_bytes=1 << 30)
TO_RANK: list[Message] = [Setup(SETTINGS, Rendezvous(1, 2, 1, "gloo", "name", "127.0.0.1", 5), 2), Begin(77)]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_messages_of_a_rank_arrive_however_they_are_cut(size: int) -> None:
    data = b"".join(map(message_frame, FROM_RANK))
    reader = RankReader()
    assert [m for at in range(0, len(data), size) for m in reader.feed(data[at : at + size])] == FROM_RANK


def test_messages_and_plans_of_rank_0_arrive_in_order_and_then_the_end() -> None:
    ours, theirs = socket.socketpair()
    words = np.arange(1000, dtype=np.int32)
    with theirs:
        with ours:
            for message in TO_RANK:
                ours.sendall(message_frame(message))
            ours.sendall(plan_frame(words))
        assert [receive(theirs), receive(theirs)] == TO_RANK
        plan = receive(theirs)
        assert isinstance(plan, np.ndarray) and plan.dtype == np.int32 and (plan == words).all()
        with pytest.raises(EOFError):
            receive(theirs)


def test_a_rank_0_that_died_without_reading_is_at_its_end_too() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"a beat that nobody reads")
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        HEADER.pack(MAX_FRAME_BYTES + 1, 1),
        plan_frame(np.zeros(3, np.int32)),
        HEADER.pack(2, 1) + b"\xc0\xc1",
        message_frame(TO_RANK[1]),
    ],
)
def test_what_no_rank_says_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        list(RankReader().feed(data))
