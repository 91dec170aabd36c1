"""Stop strings, against a search in the whole text."""

from __future__ import annotations

import random
import time

import pytest

from serving.gateway.text.stop import StopMatcher, StopSet


def search(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What must be shown: the match that is complete first, of several the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, begin, stop = min(found)
    return text[: end if include else begin], stop


def cut(text: str, choose: random.Random) -> list[str]:
    pieces = []
    while text:
        size = choose.randint(1, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def run(pieces: list[str], matcher: StopMatcher) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        text, matched = matcher.feed(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + matcher.flush(), None


@pytest.mark.parametrize("include", [False, True])
def test_any_cut_of_any_text_equals_a_search_in_the_whole(include: bool) -> None:
    choose = random.Random(5)
    num_matches = 0
    for _ in range(4000):
        letters = "ab" if choose.random() < 0.6 else "abc\né中"
        text = "".join(choose.choices(letters, k=choose.randint(0, 40)))
        stops = ["".join(choose.choices(letters, k=choose.randint(1, 6))) for _ in range(choose.randint(1, 4))]
        wanted = search(text, stops, include)
        assert run(cut(text, choose), StopMatcher(stops, include)) == wanted, (text, stops)
        assert run([text] if text else [], StopMatcher(StopSet(stops), include)) == wanted
        num_matches += wanted[1] is not None
    assert 1000 < num_matches < 3900


def test_only_what_can_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "###"])
    assert matcher.feed("Hello #") == ("Hello ", None)
    assert matcher.feed("1") == ("#1", None)
    assert matcher.feed(" ##") == (" ", None)
    assert matcher.feed("\nUs") == ("##", None)
    assert matcher.feed("er") == ("", None)
    assert matcher.flush() == "\nUser"


def test_a_stop_may_span_tokens_and_ends_the_text() -> None:
    matcher = StopMatcher(["\n\nQ"])
    assert matcher.feed("42\n") == ("42", None)
    assert matcher.feed("\n") == ("", None)
    assert matcher.feed("Question") == ("", "\n\nQ")
    assert matcher.feed("more") == ("", "\n\nQ")
    assert matcher.flush() == ""


def test_no_stops_hold_nothing_back() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("anything") == ("anything", None)
    assert matcher.flush() == ""


def test_characters_of_regular_expressions_are_characters() -> None:
    for stop in ("]", "^", "-", "\\", "[a-z]", ".*", "a|b", "^^", "\0"):
        assert run([f"x{stop}y"], StopMatcher([stop])) == ("x", stop)
        assert run(["plain"], StopMatcher([stop])) == ("plain", None)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopSet(["a", ""])


def test_the_worst_case_is_linear() -> None:
    """Four stops of 256 equal letters and a text of the same letter: no step looks back."""
    stops = StopSet(["a" * 255 + letter for letter in "bcde"])
    matcher = StopMatcher(stops)
    started = time.perf_counter()
    for _ in range(10_000):
        matcher.feed("aaaa")
    assert time.perf_counter() - started < 5  # 0.03 s when idle; quadratic it would be minutes
    assert len(matcher.flush()) == 255
