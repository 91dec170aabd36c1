"""Output is a function of tokens (C21): the same events however the tokens arrived."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

from serving.gateway.api.chat import ChatFormat
from serving.gateway.api.completions import CompletionFormat
from serving.gateway.api.generation import make_renderings
from serving.gateway.bodies import parse_chat, parse_completion
from serving.gateway.fields import Limits
from serving.gateway.rendering import Rendering, WholeRendering, json_text
from serving.gateway.streams import Choice, Request
from serving.types import NO_LOGPROBS, FinishReason
from serving.wire import pack_ids
from tests.gateway.world import CARD, CREATED, IM_END, LANGUAGE, ids_of, packed_logprob, payloads

LIMITS = Limits(CARD.tokenizer_size, CARD.max_model_len)


def make_rendering(*, is_chat: bool = False, **body: Any) -> Rendering:
    """A streamed choice without a token."""
    body = {"max_tokens": 100, "stream": True} | body
    if is_chat:
        generation = parse_chat({"messages": [{"role": "user", "content": "hi"}]} | body, LIMITS).generation
    else:
        generation = parse_completion({"prompt": "hi"} | body, LIMITS).generation
    request = Request("cmpl-0", CREATED, CARD, float("inf"))
    sampling = msgspec.structs.replace(generation.sampling, max_tokens=body["max_tokens"])
    request.choices.append(Choice(0, request, pack_ids(ids_of("hi")), sampling))
    (rendering,) = make_renderings(request, generation, ChatFormat() if is_chat else CompletionFormat(), LANGUAGE)
    return rendering


def grow(rendering: Rendering, ids: list[int]) -> None:
    choice = rendering.choice
    choice.output_ids.extend(ids)
    if choice.sampling.logprobs != NO_LOGPROBS:
        choice.logprobs += [packed_logprob(token_id, choice.sampling.logprobs) for token_id in ids]


def rendered(ids: list[int], sizes: list[int], ends_late: bool = False, **body: Any) -> bytes:
    """All bytes of a choice whose tokens came in frames of these sizes."""
    rendering = make_rendering(**body)
    sampling = rendering.choice.sampling
    ids = ids[: sampling.max_tokens]
    data = b""
    at = 0
    for size in sizes:
        grow(rendering, ids[at : at + size])
        at += size
        if at >= len(ids) and not ends_late:
            rendering.choice.finish = FinishReason.STOP if ids[-1] == IM_END else FinishReason.LENGTH
        data += rendering.drain(1 << 20)
    rendering.choice.finish = rendering.choice.finish or FinishReason.LENGTH
    return data + rendering.drain(1 << 20)


BODIES: list[dict[str, Any]] = [
    {},
    {"stop": ["wor"]},
    {"stop": ["lo w", "zzz", "w"], "include_stop_str_in_output": True},
    {"logprobs": 2, "return_token_ids": True},
    {"logprobs": 0, "stop": "é"},
    {"max_tokens": 7},
    {"stream_options": {"continuous_usage_stats": True}, "min_tokens": 6, "stop": "l"},
    {"is_chat": True},
    {"is_chat": True, "logprobs": True, "top_logprobs": 3, "return_tokens_as_token_ids": True},
    {"is_chat": True, "stop": ["ld"], "return_token_ids": True},
]
TEXTS = ["hello world", "héllo 😀 wörld\u2028\n", "", "lllll", "😀" * 5, "a\x85b\u2029c"]


@pytest.mark.parametrize("body", BODIES, ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_events_do_not_depend_on_frames(body: dict[str, Any], text: str) -> None:
    seed = 7
    draw = random.Random(seed)
    ids = [*ids_of(text), IM_END]
    one_by_one = rendered(ids, [1] * len(ids), **body)
    for round_ in range(20):
        sizes: list[int] = []
        while sum(sizes) < len(ids):
            sizes.append(draw.randrange(0, 5))
        assert rendered(ids, sizes, ends_late=draw.random() < 0.5, **body) == one_by_one, (seed, round_, sizes)


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_a_token_yields_at_most_one_event_and_the_last_one_carries_the_reason(body: dict[str, Any]) -> None:
    rendering = make_rendering(**body)
    counts = []
    reasons = []
    for token_id in [*ids_of("hello wörld 😀"), IM_END]:
        if rendering.is_over:
            break
        grow(rendering, [token_id])
        events = payloads(rendering.drain(1 << 20).decode())
        roles = [event for event in events if event["choices"][0].get("delta", {}).get("role")]
        counts.append(len(events) - len(roles))
        reasons += [event["choices"][0]["finish_reason"] for event in events]
    assert max(counts) == 1
    assert counts[-1] == 1
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) <= {None}


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_the_texts_of_all_events_are_the_text_and_stay_on_their_lines(text: str) -> None:
    data = rendered([*ids_of(text), IM_END], [1] * 64).decode()
    assert "".join(event["choices"][0]["text"] for event in payloads(data)) == text
    assert data.splitlines() == data.split("\n")[:-1]  # no decoder sees a line end inside an event
    assert "\ufffd" not in data


def test_an_unfinished_character_is_replaced_at_the_end_only() -> None:
    half = ids_of("😀")[:2]
    events = payloads(rendered(half, [1, 1], max_tokens=2).decode())
    assert [event["choices"][0]["text"] for event in events] == ["\ufffd"]
    assert events[0]["choices"][0]["finish_reason"] == "length"


def test_stop_strings_end_a_choice_before_the_engine_does() -> None:
    rendering = make_rendering(stop=["wor", "x"])
    grow(rendering, ids_of("hello world and more"))
    events = payloads(rendering.drain(1 << 20).decode())
    assert "".join(event["choices"][0]["text"] for event in events) == "hello "
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"][0]["stop_reason"] == "wor"
    assert rendering.is_over and not rendering.choice.is_done
    assert rendering.continuation.num_tokens == len(ids_of("hello wor"))  # what follows is not counted


def test_held_back_text_comes_out_when_no_stop_string_follows() -> None:
    events = payloads(rendered([*ids_of("hello wo"), IM_END], [1] * 9, stop="world").decode())
    assert "".join(event["choices"][0]["text"] for event in events) == "hello wo"


def test_stop_token_ids_end_with_their_id_and_without_their_text() -> None:
    stop = ids_of("o")[0]
    event = payloads(rendered([*ids_of("hell"), stop], [9], stop_token_ids=[stop]).decode())[-1]["choices"][0]
    assert (event["finish_reason"], event["stop_reason"], event["text"]) == ("stop", stop, "")
    event = payloads(rendered([*ids_of("hell"), IM_END], [9]).decode())[-1]["choices"][0]
    assert (event["finish_reason"], event["stop_reason"], event["text"]) == ("stop", None, "")


def test_ignored_end_of_sequence_is_a_token_like_any_other() -> None:
    ids = [*ids_of("a"), IM_END, *ids_of("b")]
    body: dict[str, Any] = {"ignore_eos": True, "max_tokens": 3}
    texts = [event["choices"][0]["text"] for event in payloads(rendered(ids, [3], **body).decode())]
    assert texts == ["a", "b"]
    shown = payloads(rendered(ids, [3], skip_special_tokens=False, **body).decode())
    assert [event["choices"][0]["text"] for event in shown] == ["a", "<|im_end|>", "b"]


def test_logprobs_of_tokens_without_text_come_with_the_next_event() -> None:
    ids = ids_of("é!")
    assert len(ids) == 3
    first, second = payloads(rendered(ids, [1, 1, 1], logprobs=1, max_tokens=3).decode())
    logprobs = first["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 0]
    assert second["choices"][0]["logprobs"] == {
        "tokens": ["!"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"!": -0.5}],
        "text_offset": [1],
    }


def test_chat_logprobs_have_bytes() -> None:
    events = payloads(rendered(ids_of("é"), [1, 1], is_chat=True, logprobs=True, top_logprobs=1, max_tokens=2).decode())
    content = events[-1]["choices"][0]["logprobs"]["content"]
    assert [item["bytes"] for item in content] == [[0xC3], [0xA9]]
    assert content[0]["top_logprobs"] == [{"token": "\\xc3", "logprob": -0.5, "bytes": [0xC3]}]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("text", ["hello é", ""])
def test_a_whole_reply_has_the_logprobs_of_the_stream(is_chat: bool, text: str) -> None:
    body: dict[str, Any] = {"logprobs": True, "top_logprobs": 3} if is_chat else {"logprobs": 3}
    rendering = make_rendering(is_chat=is_chat, stream=False, return_token_ids=True, **body)
    assert isinstance(rendering, WholeRendering)
    for token_id in (ids := [*ids_of(text), IM_END]):
        grow(rendering, [token_id])
        rendering.drain(1 << 20)
    joined: dict[str, list[Any]] = {}
    for event in payloads(rendered(ids, [1] * len(ids), is_chat=is_chat, **body).decode()):
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            joined[name] = joined.get(name, []) + values
    assert msgspec.json.decode(msgspec.json.encode(rendering.logprobs)) == joined
    assert rendering.token_ids == ids
    nothing = make_rendering(is_chat=is_chat, stream=False, **body)
    assert isinstance(nothing, WholeRendering)
    assert set(msgspec.json.decode(msgspec.json.encode(nothing.logprobs))) == set(joined)


def test_minus_infinity_is_openais_number() -> None:
    rendering = make_rendering(logprobs=0, max_tokens=1)
    rendering.choice.output_ids.append(65)
    rendering.choice.logprobs.append(bytes.fromhex("000080ff"))
    (event,) = payloads(rendering.drain(1 << 20).decode())
    assert event["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_rendering_stops_at_its_budget_and_goes_on_where_it_stopped() -> None:
    whole = rendered(ids_of("hello world" * 9)[:100], [100])
    rendering = make_rendering()
    grow(rendering, ids_of("hello world" * 9)[:100])
    rendering.choice.finish = FinishReason.LENGTH
    pieces = [rendering.drain(1000)]
    while rendering.has_more:
        pieces.append(rendering.drain(1000))
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 1400
    assert b"".join(pieces) == whole


def test_an_approximate_stream_that_moved_says_so_once_in_a_comment_and_at_its_end() -> None:
    rendering = make_rendering(max_tokens=2)
    rendering.choice.request.card = msgspec.structs.replace(CARD, determinism="approximate")
    rendering.choice.num_resumes = 1
    grow(rendering, ids_of("a"))
    text = rendering.drain(1 << 20).decode()
    grow(rendering, ids_of("b"))
    text += rendering.drain(1 << 20).decode()
    assert text.startswith(": resumed approximate\ndata: ") and text.count(": resumed") == 1
    first, last = payloads(text)
    assert "resumed" not in first
    assert last["choices"][0]["resumed"] == "approximate"


def test_json_text_is_what_json_says() -> None:
    for text in [*TEXTS, '"\\/\b\t\x00\x1f\x7f']:
        assert json.loads(json_text(text)) == text
