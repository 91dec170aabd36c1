"""Links between stages in real processes: order, unequal speeds, senders that do not wait."""

from __future__ import annotations

import time

import pytest
import torch

from models.parallel import TransportError
from models.transports.connect import Ranks
from tests.models.transports.processes import Gang, Pool

SLOT_BYTES = 1 << 14
KINDS = ["shared-memory", "gloo"]


def shapes() -> list[tuple[int, int]]:
    """From one row to four times a slot."""
    return [(1 + 37 * index % 61, 256) for index in range(40)]


def send_all(ranks: Ranks, pause_s: float) -> None:
    assert ranks.after is not None
    for index, shape in enumerate(shapes()):
        time.sleep(pause_s)
        x = torch.full(shape, float(index))
        ranks.after.send(x)
        x.fill_(-1.0)  # what was sent is the link's own


def receive_all(ranks: Ranks, pause_s: float) -> list[float]:
    assert ranks.before is not None
    found = []
    for shape in shapes():
        time.sleep(pause_s)
        x = ranks.before.receive(shape)
        assert x.shape == shape
        assert x.min() == x.max()
        found.append(float(x[0, 0]))
        x.zero_()  # and what was received is the caller's
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sender_pause_s", "receiver_pause_s"), [(0.0, 0.005), (0.005, 0.0)])
def test_tensors_arrive_in_order_whoever_is_faster(
    pool: Pool, kind: str, sender_pause_s: float, receiver_pause_s: float
) -> None:
    gang = pool.connect(kind, pp=2, slot_bytes=SLOT_BYTES)
    gang.ranks[0].start(send_all, (sender_pause_s,))
    gang.ranks[1].start(receive_all, (receiver_pause_s,))
    gang.ranks[0].result()
    assert gang.ranks[1].result() == [float(index) for index in range(40)]


def send(ranks: Ranks, *values: float) -> None:
    assert ranks.after is not None
    for value in values:
        ranks.after.send(torch.full((SLOT_BYTES // 1024, 256), value))


def receive(ranks: Ranks, count: int) -> list[float]:
    assert ranks.before is not None
    return [float(ranks.before.receive((SLOT_BYTES // 1024, 256))[0, 0]) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sender_is_one_tensor_per_stage_and_one_more_ahead(pool: Pool, kind: str) -> None:
    gang = pool.connect(kind, pp=2, slot_bytes=SLOT_BYTES)
    gang.on(0, send, 1.0, 2.0, 3.0)  # comes back although nobody has received
    assert gang.on(1, receive, 3) == [1.0, 2.0, 3.0]
    gang.ranks[0].start(send, (4.0, 5.0, 6.0, 7.0, 8.0))  # more than the link holds
    assert gang.on(1, receive, 5) == [4.0, 5.0, 6.0, 7.0, 8.0]
    gang.ranks[0].result()


def pass_on(ranks: Ranks, value: float) -> float:
    """A step through the stages: each adds one."""
    x = torch.full((3, 5), value) if ranks.before is None else ranks.before.receive((3, 5))
    x += 1
    if ranks.after is not None:
        ranks.after.send(x)
    return float(x.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_links_lead_from_a_place_to_the_same_place(pool: Pool, kind: str) -> None:
    gang = pool.connect(kind, tp=2, pp=2)
    for rank, process in enumerate(gang.ranks):
        process.start(pass_on, (10.0 * (rank % 2),))
    assert [process.result() for process in gang.ranks] == [15.0, 165.0, 30.0, 180.0]


def receive_other_shape(ranks: Ranks) -> None:
    assert ranks.before is not None
    ranks.before.receive((3, 7))


def test_a_wrong_shape_is_told(pool: Pool) -> None:
    gang: Gang = pool.connect("shared-memory", pp=2, slot_bytes=SLOT_BYTES)
    gang.on(0, send, 1.0)
    with pytest.raises(TransportError, match="rank 0 sent 16384 bytes of kind 0, expected were 84 of kind 0"):
        gang.on(1, receive_other_shape)
    with pytest.raises(TransportError, match="closed by this process"):
        gang.on(1, receive, 1)
