"""The event-stream parser: whatever the cuts and the line ends, the same events."""

from __future__ import annotations

import random

import pytest

from loadtest.sse import Event, SseError, SseParser

LINES = [
    ": queue position=3 wait_s=1.2",
    'data: {"a": 1}',
    "",
    "event: x",
    "id: 7",
    "data: first",
    "data:second",
    "data",
    "",
    ":",
    "nonsense: field",
    "retry: 10",
    "",
    "data: ünï",
    "",
    "data: [DONE]",
    "",
]
WANTED = [
    Event(b"queue position=3 wait_s=1.2", True),
    Event(b'{"a": 1}'),
    Event(b"first\nsecond\n", False, b"x", b"7"),
    Event(b"", True),
    Event("ünï".encode(), False, b"", b"7"),
    Event(b"[DONE]", False, b"", b"7"),
]


def fed(parser: SseParser, pieces: list[bytes]) -> list[Event]:
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_cuts_change_nothing(end: str) -> None:
    raw = "".join(line + end for line in LINES).encode()
    assert fed(SseParser(), [raw]) == WANTED
    assert fed(SseParser(), [raw[at : at + 1] for at in range(len(raw))]) == WANTED
    for cut in range(len(raw)):
        assert fed(SseParser(), [raw[:cut], raw[cut:]]) == WANTED, cut


def test_random_mixtures_of_line_ends_and_cuts() -> None:
    """An LF after a line that CR ended would be that line's: such a pair is not drawn."""
    for seed in range(200):
        draw = random.Random(seed)
        raw = "".join(line + draw.choice(["\n", "\r\n"]) for line in LINES).encode()
        cuts = sorted(draw.choices(range(len(raw) + 1), k=draw.randrange(6)))
        pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        assert fed(SseParser(), pieces) == WANTED, seed


def test_a_byte_order_mark_is_no_part_of_the_first_field() -> None:
    assert fed(SseParser(), [b"\xef\xbb\xbfdata: a\n\n"]) == [Event(b"a")]


def test_what_has_not_ended_is_no_event_and_shows_as_lost() -> None:
    parser = SseParser()
    assert fed(parser, [b"data: a\n\ndata: b\n"]) == [Event(b"a")]
    assert not parser.is_between_events
    assert fed(parser, [b"\n"]) == [Event(b"b")]
    assert parser.is_between_events


@pytest.mark.parametrize("raw", [b"data: " + b"x" * 200, b"data: xxxxxxxxxx\n" * 20])
def test_what_it_holds_back_is_bounded(raw: bytes) -> None:
    with pytest.raises(SseError, match="more than 100 bytes"):
        fed(SseParser(100), [raw[at : at + 7] for at in range(0, len(raw), 7)])
