"""A difference, applied, is the difference: for thousands of pairs of documents."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from k8s.patches import Change, change, difference, fitting, keyed

NAMES = ("a", "b/c", "d~e", "name", "f.g")


def a_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.choice(("text", "number", "none", "dict", "list", "named") if depth < 4 else ("text", "number"))
    if kind == "dict":
        return {name: a_value(draw, depth + 1) for name in draw.sample(NAMES, draw.randint(0, 4))}
    if kind == "list":
        return [a_value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    if kind == "named":
        return [{"name": name, "v": a_value(draw, depth + 1)} for name in "abcd"[: draw.randint(0, 4)]]
    return {"text": draw.choice("xyz"), "number": draw.randint(0, 3), "none": None}[kind]


def mutated(draw: random.Random, value: Any) -> Any:
    if draw.random() < 0.2:
        return a_value(draw, 2)
    if isinstance(value, dict):
        kept = {key: mutated(draw, part) for key, part in value.items() if draw.random() > 0.1}
        return kept | ({draw.choice(NAMES): a_value(draw, 3)} if draw.random() < 0.3 else {})
    if isinstance(value, list):
        return [mutated(draw, part) for part in value[: draw.randint(0, len(value))]] + (
            [a_value(draw, 3)] if draw.random() < 0.3 else []
        )
    return value


def test_a_difference_applied_gives_the_other() -> None:
    draw = random.Random(5)
    for _ in range(5000):
        before = {"apiVersion": "v1", "kind": "X", "metadata": {"name": "x"}, "spec": {"v": a_value(draw)}}
        after = before | {"spec": {"v": mutated(draw, before["spec"]["v"])}}
        kept = copy.deepcopy(before)
        made = change(keyed([before]), keyed([after]))
        assert made.apply(keyed([before])) == keyed([after])
        assert before == kept
        assert (not made.patched) == (before == after)


def test_objects_come_and_go() -> None:
    a, b, c = ({"apiVersion": "v1", "kind": "X", "metadata": {"name": name}} for name in "abc")
    made = change(keyed([a, b]), keyed([b, c]))
    assert made == Change(added=keyed([c]), removed=(("v1", "X", "a"),), patched={})
    assert made.apply(keyed([a, b])) == keyed([b, c])


def test_two_objects_of_one_name_are_refused() -> None:
    a = {"apiVersion": "v1", "kind": "X", "metadata": {"name": "a"}}
    with pytest.raises(ValueError, match="two objects are v1 X a"):
        keyed([a, a])


def test_names_with_slashes_and_tildes_are_escaped() -> None:
    assert difference({"a/b~c": 1}, {"a/b~c": 2}) == [{"op": "replace", "path": "/a~1b~0c", "value": 2}]


def test_only_what_an_object_has_can_be_replaced_or_removed() -> None:
    """As kustomize sees it: any other operation of a component would fail on the base."""
    thing = {"spec": {"a": 1, "list": [{"b": 2}]}}
    kept = [
        {"op": "add", "path": "/spec/c", "value": {}},
        {"op": "replace", "path": "/spec/c", "value": 3},
        {"op": "remove", "path": "/spec/list/0/b"},
    ]
    left_out = [
        {"op": "replace", "path": "/spec/d", "value": 1},
        {"op": "remove", "path": "/spec/d"},
        {"op": "remove", "path": "/spec/list/1"},
        {"op": "add", "path": "/status/x", "value": 1},
    ]
    assert fitting(thing, [*left_out, *kept, *left_out]) == kept
    assert thing == {"spec": {"a": 1, "list": [{"b": 2}]}}
