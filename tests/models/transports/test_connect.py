"""Meeting: places, refusals, and ranks that never come."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.parallel import TransportError
from models.transports.connect import Rendezvous, connect, host_store
from models.transports.distributed import address_facing
from models.transports.shared_memory import Layout, SegmentOffer, open_segment

PLACE = Rendezvous(
    rank=3, tensor_parallel_size=2, pipeline_parallel_size=2, kind="gloo", name="g", host="127.0.0.1", port=1
)


def test_a_place_travels_as_plain_values() -> None:
    assert (PLACE.stage, PLACE.tensor_rank, PLACE.world_size) == (1, 1, 4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(PLACE), type=Rendezvous) == PLACE


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 4}, "rank must be from 0 to 3; got 4"),
        ({"kind": "mpi"}, "kind must be one of shared-memory, gloo, nccl; got 'mpi'"),
        ({"dtype": "Tensor"}, "dtype must be one of torch's; got 'Tensor'"),
    ],
)
def test_wrong_places_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(PLACE, **change)


def test_a_gang_of_one_needs_nobody() -> None:
    ranks = connect(Rendezvous(0, 1, 1, "gloo", "g", "127.0.0.1", 1), timeout_s=0.1)
    assert (ranks.group.size, ranks.stages.count, ranks.before, ranks.after) == (1, 1, None, None)
    ranks.close()


@pytest.mark.parametrize("kind", ["shared-memory", "gloo"])
def test_a_rank_that_never_comes_is_a_failure(kind: str) -> None:
    store = host_store()
    with pytest.raises(TransportError) as caught:
        connect(Rendezvous(0, 2, 1, kind, "g", store.host, store.port), timeout_s=0.5)
    assert "rank 1" in str(caught.value) or "gloo of rank 0, stage 0" in str(caught.value)


def test_no_store_is_a_failure() -> None:
    with pytest.raises(TransportError, match=r"rank 3 of gang g: .*127\.0\.0\.1"):
        connect(PLACE, timeout_s=0.5)


def test_memory_of_another_gang_or_user_is_refused() -> None:
    layout = Layout("one", 2, 1, 4096)
    offer = SegmentOffer(layout)
    try:
        assert open_segment(offer.path, layout).mark == layout.mark
        with pytest.raises(TransportError, match="made for another gang"):
            open_segment(offer.path, dataclasses.replace(layout, name="two"))
        with pytest.raises(TransportError, match="not as agreed"):
            open_segment(offer.path, dataclasses.replace(layout, slot_bytes=1 << 20))
        Path(offer.path).chmod(0o666)
        with pytest.raises(TransportError, match=r"not as agreed: .*mode 100666"):
            open_segment(offer.path, layout)
        with pytest.raises(PermissionError):  # sealed: nobody can pull the memory away under the others
            os.truncate(offer.path, 0)
    finally:
        offer.close()
    with pytest.raises(TransportError, match="cannot be opened: No such file"):
        open_segment(offer.path, layout)
    with pytest.raises(ValueError, match="slot_bytes must be from 1 to 268435456; got 0"):
        dataclasses.replace(layout, slot_bytes=0)


def test_areas_do_not_overlap() -> None:
    layout = Layout("one", 3, 3, 1000)
    starts = [layout.group(stage) for stage in range(3)] + [
        layout.link(stage, rank) for stage in range(2) for rank in range(3)
    ]
    sizes = [3 * (128 + 2 * layout.piece_bytes)] * 3 + [2 * 128 + layout.ring_bytes] * 6
    assert all(start + size <= end for start, size, end in zip(starts, sizes, [*starts[1:], layout.total], strict=True))
    assert layout.ring_bytes >= 4 * 1000


def test_this_host_as_others_see_it() -> None:
    assert address_facing("127.0.0.1", 80) == "127.0.0.1"
