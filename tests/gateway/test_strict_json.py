"""Bodies on which parsers disagree are refused, and what is refused is named."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from serving.errors import InvalidJson
from serving.gateway.strict_json import MAX_DEPTH, NotJson, decode


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[1,]", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "not valid"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": 1, "a": 2}', "duplicate key: 'a'"),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', "duplicate key: 'c'"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate key: 'a'"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deeper than 16"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "deeper than 16"),
        (b"[" * 30_000, "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "more than"),
        (b"[" + b"[]," * 50_000 + b"[]]", "more than"),
    ],
)
def test_refused(body: bytes, says: str) -> None:
    with pytest.raises(InvalidJson, match=says):
        decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[:::"}',
        b'{"a": "\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[", "b": {"c": "\\\\"}}',
        b'{"a": "\\\\\\"{", "\\"b:": [":", {":": ":"}]}',
        b'{"\\\\": {"a": 1}, "a": [1.5, -2e3, null, true, "\\ud83d\\ude00"]}',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"{}",
        b" [ ] ",
    ],
)
def test_structure_inside_strings_is_text(body: bytes) -> None:
    assert decode(body) == json.loads(body)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000])
def test_numbers_that_json_lacks_stay_visible_to_their_field(literal: str) -> None:
    value = decode(b'{"temperature": %s}' % literal.encode())["temperature"]
    assert isinstance(value, NotJson)
    assert value.literal == literal


def test_a_duplicate_among_thousands_is_found_in_time() -> None:
    body = b"{" + b",".join(b'"%x":1' % key for key in range(6500)) + b',"0":2}'
    begun = time.thread_time()
    with pytest.raises(InvalidJson, match="duplicate key: '0'"):
        decode(body)
    assert time.thread_time() - begun < 0.1  # 0.4 s when every name is compared with every other


def test_agrees_with_the_standard_parser_on_random_documents() -> None:
    seed = 20_240_607
    draw = random.Random(seed)

    def value(depth: int) -> Any:
        kind = draw.randrange(7 if depth < 5 else 5)
        if kind == 5:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        if kind == 6:
            return {text(): value(depth + 1) for _ in range(draw.randrange(4))}
        return (None, True, draw.randrange(-(2**40), 2**40), draw.random(), text())[kind]

    def text() -> str:
        return "".join(draw.choice('[]{}:,"\\ \tabé\u2028😀') for _ in range(draw.randrange(6)))

    for round_ in range(500):
        document = value(0)
        body = json.dumps(document, ensure_ascii=draw.random() < 0.5).encode()
        assert decode(body) == document, (seed, round_)
