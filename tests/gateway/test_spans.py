"""A life as spans: a tree whose times nest, with a resume where a replica was lost."""

from __future__ import annotations

import pytest

from serving.gateway.spans import MAX_CHOICES, MAX_POINTS, Part, parts_of
from tests.gateway.lives import ARRIVED, a_life, failed, random_life, refused


def tree(parts: list[Part], parent: Part | None = None) -> list[object]:
    return [
        (part.name, round(part.at - ARRIVED, 6), round(part.until - ARRIVED, 6), tree(parts, part))
        for part in sorted(parts, key=lambda part: part.at)
        if part.parent is parent
    ]


def test_a_resumed_request_is_told_from_its_arrival_to_its_end() -> None:
    parts = parts_of(a_life())
    resume = ("resume", 0.5, 0.7, [("queue", 0.5, 0.6, []), ("prefill", 0.6, 0.7, [])])
    assert tree(parts) == [
        (
            "POST /v1/completions",
            0.0,
            1.0,
            [
                ("read", 0.0, 0.01, []),
                ("tokenise", 0.01, 0.02, []),
                ("queue", 0.1, 0.2, []),
                ("prefill", 0.2, 0.3, []),
                ("decode", 0.3, 0.7, [resume]),
            ],
        )
    ]
    found = {part.name: part for part in parts}
    assert found["queue"].attributes["argosy.why"] == "no_replica", "the last of the two"
    assert found["resume"].attributes == {"argosy.replica": "replica-0", "argosy.cause": "lost", "argosy.choice": 0}
    prefills = [part for part in parts if part.name == "prefill"]
    assert [part.attributes["argosy.resumed_tokens"] for part in prefills] == [0, 2]
    assert [name for name, _, _ in prefills[0].points] == ["waited", "admitted", "chunk"]
    (gap,) = [point for point in found["decode"].points if point[0] == "gap"]
    assert gap[2]["argosy.cause"] == "resumed" and gap[2]["argosy.for_s"] == pytest.approx(0.35)


def test_a_request_that_was_refused_has_no_more_than_its_preparation() -> None:
    assert [part.name for part in parts_of(refused())] == ["POST /v1/completions", "read", "tokenise"]


def test_a_failed_request_keeps_what_came_before() -> None:
    assert {"queue", "prefill", "decode", "resume"} <= {part.name for part in parts_of(failed())}


def test_many_choices_are_counted_and_not_all_told() -> None:
    parts = parts_of(a_life(n=20))
    assert sum(part.name == "decode" for part in parts) == MAX_CHOICES
    assert parts[0].attributes["argosy.choices_left_out"] == 20 - MAX_CHOICES


def test_whatever_happens_times_nest_and_nothing_grows_without_bound() -> None:
    names = set()
    for seed in range(400):
        life = random_life(seed)
        parts = parts_of(life)
        known: set[int] = set()
        for part in parts:
            names.add(part.name)
            assert part.at <= part.until and len(part.points) <= MAX_POINTS
            if part.parent is None:
                assert part is parts[0] and (part.at, part.until) == (life.arrived, life.ended)
            else:
                assert id(part.parent) in known, "parents come first"
                assert part.parent.at <= part.at and part.until <= part.parent.until, (seed, part.name)
            known.add(id(part))
        told = parts[0].attributes.get("argosy.choices_left_out", 0)
        assert told == max(len(life.choices) - MAX_CHOICES, 0)
        for index, choice in enumerate(life.choices[:MAX_CHOICES]):
            own = [part for part in parts if part.attributes.get("argosy.choice") == index]
            kept = [event.kind for event in choice.events]
            assert sum(part.name == "resume" for part in own) == kept.count("lost")
            assert sum(part.name == "prefill" for part in own) == kept.count("sent")
            assert sum(part.name == "decode" for part in own) == (choice.num_tokens > 0)
    assert names >= {"read", "tokenise", "queue", "prefill", "decode", "resume"}
