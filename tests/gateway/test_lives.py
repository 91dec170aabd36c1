"""Which lives are kept, and under which names."""

from __future__ import annotations

import itertools
import random

import pytest

from serving.errors import NoCapacity
from serving.gateway.choice_life import ChoiceLife, Event
from serving.gateway.life import Life
from serving.gateway.lives import Lives

_numbers = itertools.count()


def begin(lives: Lives, request_id: str = "", num_events: int = 3) -> Life:
    number = next(_numbers)
    life = Life(request_id or f"req-{number}", "/v1/completions", float(number), 0.0)
    lives.begin(life)
    life.id = f"cmpl-{number}"
    choice = ChoiceLife()
    choice.queued(float(number), "no_permit", 1, 0)
    choice.events += [Event("chunk", 0.0, 0.0) for _ in range(num_events)]
    life.choices = [choice]
    lives.admitted(life)
    return life


def test_a_life_is_found_by_both_names_until_it_is_forgotten() -> None:
    lives = Lives(max_ended=2)
    first = begin(lives)
    assert lives.find(first.id) is lives.find(first.request_id) is first
    assert list(lives.running()) == [first] and lives.num_running == 1
    first.end(1.0, None, has_left=False)
    assert list(lives.running()) == [] and list(lives.ended()) == [first]
    for _ in range(2):
        begin(lives).end(2.0, None, has_left=False)
    assert lives.find(first.id) is lives.find(first.request_id) is None


def test_of_several_with_one_x_request_id_the_newest_is_found_and_none_shadows_an_id() -> None:
    lives = Lives(max_ended=2)
    old, new = begin(lives, "mine"), begin(lives, "mine")
    impostor = begin(lives, old.id)
    assert lives.find("mine") is new
    assert lives.find(old.id) is old and impostor.request_id == old.id
    for life in (old, new):
        life.end(1.0, None, has_left=False)
    impostor.end(2.0, None, has_left=False)  # forgets `old`, not what took its name
    assert lives.find("mine") is new and lives.find(old.id) is impostor


def test_nonsense_does_not_push_out_what_is_worth_reading() -> None:
    lives = Lives(max_ended=5, max_refused=3)
    served = [begin(lives) for _ in range(5)]
    for life in served:
        life.end(1.0, None, has_left=False)
    for number in range(100):
        refused = Life(f"bad-{number}", "/v1/completions", 0.0, 0.0)
        lives.begin(refused)
        refused.end(2.0 + number, NoCapacity("full"), has_left=False)
        assert refused.state == "refused"
    assert [life.state for life in lives.ended()] == ["refused"] * 3 + ["finished"] * 5
    assert lives.find("bad-99") is not None and lives.find("bad-50") is None


def test_memory_is_bounded_by_events() -> None:
    draw, lives = random.Random(5), Lives(max_events=1000)
    for _ in range(500):
        begin(lives, num_events=draw.randrange(150)).end(1.0, None, has_left=False)
        assert sum(life.num_events for life in lives.ended()) <= 1000
    kept = list(lives.ended())
    assert len(kept) > 5
    assert set(lives._by_id.values()) == set(lives._by_request_id.values()) == set(kept)


def test_every_sink_hears_of_every_end_once(caplog: pytest.LogCaptureFixture) -> None:
    lives, heard = Lives(), []

    def broken(life: Life) -> None:
        raise RuntimeError("a broken sink")

    lives.sinks += [broken, heard.append]
    life = begin(lives)
    life.end(1.0, None, has_left=True)
    life.end(2.0, NoCapacity("late"), has_left=False)
    assert heard == [life] and life.state == "cancelled" and life.ended == 1.0
    assert "a broken sink" in caplog.text


def test_what_is_kept_of_a_failure_keeps_no_text_alive() -> None:
    """An exception holds the frames that it came through, and those the text of the request."""
    life = begin(Lives())

    def refuse(prompt: str) -> None:
        raise NoCapacity(f"{len(prompt)} characters are too many.", reason="saturated")

    try:
        refuse("a canary")
    except NoCapacity as error:
        assert error.__traceback__ is not None
        life.end(1.0, error, has_left=False)
    assert life.error is not None and life.error.__traceback__ is None and life.error.__context__ is None
    assert (life.error.message, life.error.error_code, life.error.reason, life.error.status) == (
        "8 characters are too many.", "no_capacity", "saturated", 503,
    )  # fmt: skip
