"""One link above the bytes: permits, cancels, journalling, and what it does not believe (C21, C22, F8)."""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from serving import wire
from serving.gateway.link import MAX_HANDLE, Cause, Link
from serving.gateway.ticket import Job, Ticket
from serving.types import FinishReason
from tests.gateway.plane import CARD, Client
from tests.gateway.test_pulse import make_beat


class Owner:
    """Hears from the link, as the placement does."""

    def __init__(self) -> None:
        self.over: list[Ticket] = []
        self.returned: list[tuple[Cause, list[Ticket]]] = []
        self.rejects: list[tuple[Ticket, str]] = []

    def advanced(self, link: Link) -> None:
        pass

    def finished(self, ticket: Ticket) -> None:
        ticket.is_over = True
        self.over.append(ticket)

    def rejected(self, link: Link, ticket: Ticket, reject: wire.Reject) -> None:
        self.rejects.append((ticket, reject.code))

    def ended(self, link: Link, cause: Cause, tickets: list[Ticket]) -> None:
        self.returned.append((cause, tickets))


class World:
    def __init__(self, granted: int = 100) -> None:
        self.owner = Owner()
        self.frames: list[wire.FromGateway] = []
        self.deferred: list[Callable[[], None]] = []
        self.num_aborts = 0
        self.now = 0.0
        hello = wire.HelloReply(1, CARD, 1, "replica-0", b"", b"")
        self.link = Link(
            hello,
            self.owner,
            write=lambda frame: self.frames.append(wire.decode_from_gateway(frame[4:])),
            abort=self._abort,
            defer=self.deferred.append,
            clock=lambda: self.now,
        )
        self.link.receive(make_beat(granted=granted))

    def _abort(self) -> None:
        self.num_aborts += 1

    def submit(self, **request: Any) -> tuple[Client, Ticket]:
        client = Client(**request)
        ticket = Ticket(
            choice=client.choice, job=Job(client.request), order=0, priority=0, enqueued_at=0.0, expires=1e9
        )
        ticket.job.tickets.append(ticket)
        self.link.submit(ticket)
        return client, ticket

    def step(self, *pairs: tuple[int, int], **rare: Any) -> None:
        fields: dict[str, Any] = {"finished": [], "admitted": [], "logprobs": [], "granted": 0, **rare}
        tokens = array("I", [number for pair in pairs for number in pair]).tobytes()
        self.link.receive(wire.Step(step=1, tokens=tokens, **fields))


def test_tokens_reach_their_journals_and_each_choice_is_called_once() -> None:
    world = World()
    (first, _), (second, _) = world.submit(prompt=(20,) * 17), world.submit()
    world.step((0, 50), (1, 60), (0, 51), admitted=[(0, 16), (1, 0)])
    world.step((1, 61))
    assert list(first.choice.output_ids) == [50, 51]
    assert list(second.choice.output_ids) == [60, 61]
    assert first.progress == [(0, 2)]
    assert second.progress == [(0, 1), (0, 2)]


def test_permits_are_cumulative_and_never_shrink() -> None:
    world = World(granted=2)
    world.submit()
    assert world.link.num_permits == 1
    world.link.receive(make_beat(granted=1))  # an older word
    assert world.link.num_permits == 1
    world.step(granted=5)
    assert world.link.num_permits == 4


def test_no_work_for_a_replica_that_is_not_ready() -> None:
    world = World()
    assert world.link.can_take
    for state in ("loading", "draining", "something new"):
        world.link.receive(make_beat(state=state, granted=100))
        assert not world.link.can_take
    world.link.receive(make_beat(granted=100))
    world.link.is_draining = True  # by the word of the directory
    assert world.link.state == "draining"
    assert not world.link.can_take


def test_cancels_of_one_turn_share_a_frame() -> None:
    world = World()
    tickets = [world.submit()[1] for _ in range(5)]
    world.frames.clear()
    for ticket in tickets[:3]:
        world.link.cancel(ticket)
    assert world.frames == []
    assert len(world.deferred) == 1
    world.deferred.pop()()
    assert world.frames == [wire.Cancel([0, 1, 2])]
    world.link.cancel(tickets[3])
    world.deferred.pop()()
    assert world.frames[1:] == [wire.Cancel([3])]


def test_tokens_of_a_cancelled_row_are_nobodys() -> None:
    world = World()
    (gone, ticket), (stays, _) = world.submit(), world.submit()
    world.link.cancel(ticket)
    world.step((0, 50), (1, 60), finished=[(0, 2, 50)], admitted=[(0, 0)])
    assert not gone.choice.output_ids and gone.choice.finish is None and gone.progress == []
    assert list(stays.choice.output_ids) == [60]


def test_a_sibling_cancelled_by_progress_hears_nothing_of_the_same_frame() -> None:
    world = World()
    (first, _), (second, ticket) = world.submit(), world.submit()

    def cancel_sibling(_: object) -> None:
        ticket.is_over = True
        world.link.cancel(ticket)

    first.on_token = cancel_sibling
    world.step((0, 50), (1, 60))
    assert second.progress == []


def test_an_end_without_a_token_in_the_frame_is_still_progress() -> None:
    world = World()
    client, _ = world.submit(max_tokens=1)
    world.step((0, 50))
    world.step(finished=[(0, 1, -1)])
    assert client.choice.finish is FinishReason.LENGTH
    assert client.progress == [(0, 1), (0, 1)]
    assert world.link.num_rows == 0
    assert len(world.owner.over) == 1


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    world, other = World(), World()
    client, ticket = world.submit(prompt=(20,) * 50)
    world.step(admitted=[(0, 32)])
    world.link.end(Cause.LOST)
    other.link.submit(ticket)
    other.step(admitted=[(0, 48)])
    assert client.choice.cached_tokens == 32


def test_a_submit_carries_the_journal() -> None:
    world = World()
    client, ticket = world.submit(prompt=(1, 2, 3))
    world.step((0, 50), (0, 51))
    world.link.end(Cause.LOST)
    other = World()
    other.link.submit(ticket)
    frame = other.frames[-1]
    assert isinstance(frame, wire.Submit)
    assert list(wire.unpack_ids(frame.resume_ids)) == [50, 51]
    assert list(wire.unpack_ids(frame.prompt_ids)) == [1, 2, 3]
    assert frame.request_id == client.request.id


def test_logprobs_stand_beside_their_tokens() -> None:
    world = World()
    (plain, _), (wants, _) = world.submit(), world.submit(logprobs=1)
    entries = [struct.pack("<fIf", -k, 9, -1.0) for k in (1.0, 2.0)]
    world.step((0, 50), (1, 60), (1, 61), logprobs=[(2, entries[1]), (1, entries[0])])
    assert wants.choice.logprobs == entries
    assert plain.choice.logprobs == []


def entry(size: int = 4) -> bytes:
    return b"\0" * size


GARBAGE: list[tuple[str, dict[str, Any]]] = [
    ("token id 300", {"pairs": [(0, 50), (1, 300)]}),
    ("token id 4294967295", {"pairs": [(0, 0xFFFFFFFF)]}),
    ("handle 2: never submitted", {"pairs": [(0, 50), (2, 60)]}),
    ("tokens of 3", {"pairs": [(0, 50), (0, 51), (0, 52), (0, 53)]}),
    ("0 logprobs for 1", {"pairs": [(1, 60)]}),
    ("2 logprobs for 1", {"pairs": [(1, 60), (0, 50)], "logprobs": [(0, entry()), (0, entry())]}),
    ("logprobs entry 1", {"pairs": [(1, 60)], "logprobs": [(1, entry())]}),
    ("logprobs entry 0", {"pairs": [(1, 60)], "logprobs": [(0, entry(6))]}),
    ("logprobs entry -1", {"pairs": [(1, 60)], "logprobs": [(-1, entry())]}),
    ("ended by length after 1", {"pairs": [(0, 50)], "finished": [(0, 1, -1)]}),
    ("-3 cached tokens", {"pairs": [], "admitted": [(0, -3)]}),
    ("4000 cached tokens", {"pairs": [], "admitted": [(0, 4000)]}),
    ("finish reason 9", {"pairs": [(0, 50)], "finished": [(0, 9, -1)]}),
    ("ended by stop token 51", {"pairs": [(0, 50)], "finished": [(0, 2, 51)]}),
    ("ended by stop token -1", {"pairs": [], "finished": [(0, 2, -1)]}),
]


@pytest.mark.parametrize(("message", "step"), GARBAGE, ids=[message for message, _ in GARBAGE])
def test_garbage_is_refused_and_leaves_whole_journals(message: str, step: dict[str, Any]) -> None:
    world = World()
    plain, _ = world.submit(max_tokens=3)
    wants, _ = world.submit(logprobs=0)
    rare = {key: value for key, value in step.items() if key != "pairs"}
    duplicates = message.startswith("2 logprobs")
    with pytest.raises(wire.WireError, match="logprobs entry 0" if duplicates else message):
        world.step(*step["pairs"], **rare)
    for client in (plain, wants):
        choice = client.choice
        assert choice.finish is None
        assert all(0 <= token < 300 for token in choice.output_ids)
        assert len(choice.output_ids) <= choice.sampling.max_tokens
    assert len(wants.choice.logprobs) == len(wants.choice.output_ids)


@pytest.mark.parametrize("size", [1, 4, 7, 12])
def test_tokens_come_in_pairs_of_u32(size: int) -> None:
    world = World()
    with pytest.raises(wire.WireError, match="not a multiple of 8"):
        world.link.receive(wire.Step(1, b"\0" * size, [], [], [], 0))


def test_a_second_hello_is_no_message_of_an_open_link() -> None:
    world = World()
    with pytest.raises(wire.WireError, match="unexpected HelloReply"):
        world.link.receive(wire.HelloReply(1, CARD, 1, "", b"", b""))


def test_mangled_frames_are_refused_or_harmless() -> None:
    draw = random.Random(1)
    num_refused = 0
    for _ in range(3000):
        world = World()
        clients = [world.submit(max_tokens=4, logprobs=logprobs)[0] for logprobs in (-1, 0, 2)]
        pairs = array("I", [0, 50, 1, 60, 2, 70]).tobytes()
        frame = wire.encode(
            wire.Step(1, pairs, [(0, 2, 50)], [(0, 0), (1, 0), (2, 0)], [(1, entry()), (2, entry(20))], 7)
        )
        mangled = bytearray(frame[4:])
        for _ in range(draw.randrange(1, 4)):
            mangled[draw.randrange(len(mangled))] = draw.randrange(256)
        try:
            world.link.receive(wire.decode_from_replica(bytes(mangled)))
        except wire.WireError:
            num_refused += 1
        for client in clients:
            choice = client.choice
            assert all(0 <= token < 300 for token in choice.output_ids)
            assert len(choice.output_ids) <= 4
            assert choice.sampling.logprobs < 0 or len(choice.logprobs) == len(choice.output_ids)
            assert choice.cached_tokens is None or 0 <= choice.cached_tokens <= 7
            assert choice.finish is None or choice.output_ids
            for packed in choice.logprobs:
                wire.unpack_logprobs(packed)
    assert 1000 < num_refused < 3000


def test_the_end_is_a_fence() -> None:
    world = World()
    client, ticket = world.submit()
    world.step((0, 50))
    world.link.end(Cause.STALLED, "no beat")
    world.link.end(Cause.LOST, "again")
    world.step((0, 51), finished=[(0, 2, 51)])
    assert world.num_aborts == 1
    assert world.owner.returned == [(Cause.STALLED, [ticket])]
    assert list(client.choice.output_ids) == [50]
    assert not world.link.can_take
    assert world.link.load == 0


def test_rows_come_back_in_order_of_submission() -> None:
    world = World()
    tickets = [world.submit()[1] for _ in range(20)]
    world.link.cancel(tickets.pop(3))
    world.link.end(Cause.LOST)
    assert world.owner.returned[0][1] == tickets


def test_a_reject_takes_the_row_off() -> None:
    world = World()
    _, ticket = world.submit()
    world.link.receive(wire.Reject(0, "draining", ""))
    assert world.owner.rejects == [(ticket, "draining")]
    assert world.link.num_rows == 0
    world.link.receive(wire.Reject(0, "draining", ""))  # of a row that is gone
    with pytest.raises(wire.WireError, match="never submitted"):
        world.link.receive(wire.Reject(1, "draining", ""))


def test_load_counts_rows_and_what_is_still_to_be_computed() -> None:
    world = World()
    assert world.link.load == 0
    _, ticket = world.submit(prompt=tuple(range(100)))
    waiting = world.link.load
    world.step(admitted=[(0, 0)])
    assert waiting == world.link.load + 100
    world.link.cancel(ticket)
    assert world.link.load == 0
    world.link.receive(make_beat(granted=100, num_running=3, num_waiting=2))
    assert world.link.foreign_load > 0


def test_one_requests_bug_does_not_cost_the_others_their_tokens() -> None:
    world = World()
    (broken, _), (fine, _) = world.submit(), world.submit()

    def bug(_: object) -> None:
        raise RuntimeError("a bug")

    broken.on_token = bug
    world.step((0, 50), (1, 60))
    assert fine.progress == [(0, 1)]


def test_a_connection_whose_handles_are_used_up_is_replaced() -> None:
    world = World(granted=MAX_HANDLE + 100)
    world.link._next_handle = MAX_HANDLE
    _, ticket = world.submit()
    assert world.link.num_permits == 0
    world.link.receive(make_beat(granted=0))
    assert world.link.cause is None  # its last row still runs
    world.link.cancel(ticket)
    world.link.receive(make_beat(granted=0))
    assert world.link.cause is Cause.LOST


def test_an_asset_arrives_in_pieces() -> None:
    world = World()
    got: list[bytes | None] = []
    world.link.request_asset("tokenizer.json", got.append)
    world.link.receive(wire.Asset("tokenizer.json", "", b"abc", 0, 5))
    assert got == []
    world.link.receive(wire.Asset("tokenizer.json", "", b"de", 3, 5))
    assert got == [b"abcde"]
    world.link.receive(wire.Asset("tokenizer.json", "", b"abc", 0, 5))  # to nobody
    world.link.request_asset("small", got.append)
    world.link.receive(wire.Asset("small", "", b"whole"))
    assert got[1:] == [b"whole"]
    world.link.request_asset("lost", got.append)
    world.link.end(Cause.LOST)
    world.link.request_asset("late", got.append)
    assert got[2:] == [None, None]


@pytest.mark.parametrize(("data", "offset", "total"), [(b"abc", 1, 5), (b"abcdef", 0, 5), (b"a", 0, 1 << 40)])
def test_pieces_that_do_not_fit_are_refused(data: bytes, offset: int, total: int) -> None:
    world = World()
    world.link.request_asset("tokenizer.json", lambda data: None)
    with pytest.raises(wire.WireError, match="asset"):
        world.link.receive(wire.Asset("tokenizer.json", "", data, offset, total))
