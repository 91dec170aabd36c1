"""The generation endpoints as their users see them: the official client, streamed and whole."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from typing import Any

import openai
import pytest

from serving.errors import EngineError, NoCapacity
from serving.wire import unpack_ids
from tests.gateway.world import CONTEXT, CREATED, IM_END, MODEL, Script, World, a_world, ids_of, payloads, until

USAGE = {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 0}}


def test_whole_completion_has_exactly_the_documented_shape() -> None:
    with a_world() as world:
        reply = world.complete()
    assert reply.status_code == 200
    body = reply.json()
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [
            {"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ],
        "system_fingerprint": "f00d",
        "usage": USAGE,
    }
    assert reply.headers["x-argosy-determinism"] == "exact"
    assert int(reply.headers["openai-processing-ms"]) >= 0
    assert reply.headers["x-request-id"].startswith("req-")


def test_streamed_completion_has_exactly_the_documented_shape() -> None:
    with a_world() as world:
        reply = world.complete(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["x-argosy-determinism"] == "exact"
    *events, usage, done = payloads(reply.text)
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"] == USAGE
    assert len({(event["id"], event["created"], event["model"]) for event in [*events, usage]}) == 1
    assert {tuple(event) for event in events} == {("id", "object", "created", "model", "choices", "system_fingerprint")}
    assert events[0]["choices"] == [
        {"index": 0, "text": "he", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ]
    assert "".join(event["choices"][0]["text"] for event in events) == "hello world"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_whole_chat_has_exactly_the_documented_shape() -> None:
    with a_world() as world:
        body = world.chat().json()
    assert body.pop("id").startswith("chatcmpl-")
    message = {"role": "assistant", "content": "hello world", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert body == {
        "object": "chat.completion",
        "created": CREATED,
        "model": MODEL,
        "choices": [choice],
        "system_fingerprint": "f00d",
        "service_tier": None,
        "usage": USAGE | {"prompt_tokens": 21, "total_tokens": 30},
    }


def test_streamed_chat_begins_with_one_role_chunk_per_choice() -> None:
    with a_world() as world:
        events = payloads(world.chat(stream=True, n=3).text)
    assert events.pop() == "[DONE]"
    for index in range(3):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert mine[0] == {
            "index": 0 + index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        assert not any("role" in choice["delta"] for choice in mine[1:])
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "hello world"
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "stop"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_the_official_client_reads_all_of_it() -> None:
    with a_world(Script(cached_tokens=16)) as world:
        client = world.openai()
        whole = client.completions.create(model=MODEL, prompt="hi", logprobs=2)
        assert whole.choices[0].text == "hello world"
        assert whole.usage and whole.usage.prompt_tokens_details
        assert whole.usage.prompt_tokens_details.cached_tokens == 16
        assert whole.choices[0].logprobs and whole.choices[0].logprobs.tokens
        assert whole.choices[0].logprobs.tokens[:3] == ["he", "ll", "o"]
        stream = client.completions.create(model=MODEL, prompt="hi", stream=True)
        assert "".join(event.choices[0].text for event in stream) == "hello world"
        chat = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2
        )
        assert chat.choices[0].message.content == "hello world"
        assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
        assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "argosy"


def test_the_official_asynchronous_client_runs_many_streams_at_once() -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage
        assert usage is not None and usage.completion_tokens == 9
        return text

    async def many(world: World) -> None:
        async with world.async_openai() as client:
            assert set(await asyncio.gather(*(one(client) for _ in range(32)))) == {"hello world"}

    with a_world(Script(gap_s=0.002)) as world:
        asyncio.run(many(world))


def test_choices_are_prompt_major() -> None:
    with a_world() as world:
        body = world.complete(prompt=["ab", "abc"], n=2, return_token_ids=True).json()
        request = world.plane.submitted[0]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [len(choice["prompt_token_ids"]) for choice in body["choices"]] == [2, 2, 3, 3]
    assert body["choices"][3]["token_ids"] == [*ids_of("hello world"), IM_END]
    assert body["usage"]["prompt_tokens"] == 5  # once per prompt
    assert body["usage"]["completion_tokens"] == 36
    assert [choice.sampling.choice for choice in request.choices] == [0, 1, 2, 3]
    assert len({choice.sampling.seed for choice in request.choices}) == 1


def test_a_request_reaches_the_data_plane_as_it_was_asked() -> None:
    with a_world() as world:
        world.complete(prompt=[[1, 2], [3]], seed=-2, temperature=0.5, priority=-7, max_tokens=5, cache_salt="s")
        world.complete(prompt=None)
        world.complete(prompt="abcdef", truncate_prompt_tokens=2)
        first, second, third = world.plane.submitted
    assert [list(unpack_ids(choice.prompt_ids)) for choice in first.choices] == [[1, 2], [3]]
    assert first.choices[0].sampling.seed == 2**64 - 2
    assert first.choices[0].sampling.temperature == 0.5
    assert first.choices[0].sampling.max_tokens == 5
    assert first.priority == 7
    assert len(first.salt) == 16 and first.salt != second.salt
    assert list(unpack_ids(second.choices[0].prompt_ids)) == [IM_END]  # no bos: a document begins after an end
    assert list(unpack_ids(third.choices[0].prompt_ids)) == ids_of("ef")
    assert second.choices[0].sampling.max_tokens == 16


def test_chat_may_use_the_rest_of_the_context() -> None:
    with a_world() as world:
        world.chat()
        choice = world.plane.submitted[0].choices[0]
    assert choice.sampling.max_tokens == CONTEXT - len(choice.prompt_ids) // 4


def test_special_text_in_messages_stays_text() -> None:
    with a_world() as world:
        world.chat(messages=[{"role": "user", "content": "<|im_end|>"}])
        ids = list(unpack_ids(world.plane.submitted[0].choices[0].prompt_ids))
    assert ids.count(IM_END) == 1


def test_no_tokens_wanted() -> None:
    with a_world() as world:
        body = world.complete(max_tokens=0, n=2).json()
        events = payloads(world.complete(max_tokens=0, stream=True).text)
        assert world.plane.submitted == []
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [("", "length")] * 2
    assert body["usage"] == USAGE | {"completion_tokens": 0, "total_tokens": 2}
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == ["length"]
    assert events[-1] == "[DONE]"


def test_a_stop_string_cancels_the_row_at_once() -> None:
    with a_world(Script(text="one two three " * 20, gap_s=0.005)) as world:
        body = world.complete(stop=["two"], max_tokens=200).json()
        until(lambda: world.plane.num_running == 0)
        assert len(world.plane.cancelled) == 1
    assert body["choices"][0]["text"] == "one "
    assert body["choices"][0]["stop_reason"] == "two"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(ids_of("one two"))


def test_a_choice_whose_end_never_arrives_ends_by_its_tokens() -> None:
    with a_world(Script(lacks_end=True)) as world:
        body = world.complete(max_tokens=4).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert len(world.plane.cancelled) == 1  # else it would be resumed for nothing


def test_whole_and_streamed_replies_say_the_same() -> None:
    body: dict[str, Any] = {"logprobs": 3, "n": 2, "return_token_ids": True, "stop": "rld"}
    with a_world(Script(frames=(2, 1, 5))) as world:
        whole = world.complete(**body).json()
        events = payloads(world.complete(**body, stream=True).text)[:-1]
    for index, choice in enumerate(whole["choices"]):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(item["text"] for item in mine) == choice["text"]
        assert [token_id for item in mine for token_id in item["token_ids"]] == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            assert [value for item in mine for value in item["logprobs"][name]] == values
        assert mine[-1]["stop_reason"] == choice["stop_reason"] == "rld"
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_errors_raise_the_right_exception_in_the_official_client() -> None:
    with a_world() as world:
        client = world.openai()
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="../../etc/passwd", prompt="hi")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as too_long:
            client.completions.create(model=MODEL, prompt="hi", max_tokens=CONTEXT)
        assert too_long.value.code == "context_length_exceeded"
        assert "This model's maximum context length is 512 tokens" in too_long.value.message
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.completions.create(model=MODEL, prompt="hi", echo=True)
        assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "echo")
        world.plane.refusal = NoCapacity("full", retry_after_s=7.2, reason="saturated")
        with pytest.raises(openai.InternalServerError) as full:
            client.completions.create(model=MODEL, prompt="hi")
        headers = full.value.response.headers
        assert full.value.status_code == 503
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("8", "7200")
        assert (headers["x-should-retry"], headers["x-argosy-dropped-reason"]) == ("true", "saturated")
        assert "x-request-id" in headers


def test_context_limit_counts_prompt_and_completion() -> None:
    with a_world() as world:
        assert world.complete(prompt=[5] * 500, max_tokens=12).status_code == 200
        for prompt, max_tokens, param in (
            ([5] * 500, 13, "max_tokens"),
            ([5] * 513, 0, "prompt"),
            ("x " * 9000, 1, "prompt"),
        ):
            reply = world.complete(prompt=prompt, max_tokens=max_tokens)
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "context_length_exceeded"
            assert reply.json()["error"]["param"] == param
            assert reply.json()["error"]["message"].startswith("This model's maximum context length is 512 tokens")
        reply = world.chat(messages=[{"role": "user", "content": "x " * 600}])
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
        assert world.complete(prompt="x " * 600, truncate_prompt_tokens=-1).status_code == 200


def test_a_whole_reply_whose_engine_fails_is_a_plain_error() -> None:
    with a_world(Script(fail_after=3, failure=EngineError("The engine failed on this request."))) as world:
        reply = world.complete(n=4)
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "engine_error"
        assert reply.headers["x-should-retry"] == "false"
        until(lambda: world.plane.num_running == 0)


def test_lenient_requests_learn_what_was_ignored() -> None:
    with a_world() as world:
        reply = world.post("/v1/completions", {"prompt": "hi", "best_of": 3, "x\r\ny": 1}, x_argosy_lenient="1")
    assert reply.status_code == 200
    assert reply.headers["x-argosy-ignored"] == "best_of,x__y"


def test_a_request_before_the_first_replica_waits_for_it() -> None:
    with a_world() as world:
        cards, world.plane.cards_now = world.plane.cards_now, []
        world.loop.call_soon_threadsafe(world.loop.call_later, 0.3, lambda: setattr(world.plane, "cards_now", cards))
        assert world.complete().status_code == 200


def test_without_any_replica_it_is_refused_in_time() -> None:
    with a_world(queue_timeout_s=0.2) as world:
        world.plane.cards_now = []
        world.plane.ready = (False, "no replica is connected, 0 known")
        reply = world.complete()
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "no_capacity"
        assert 0 < int(reply.headers["retry-after"]) <= 120
        assert world.complete(model="other").status_code == 404


def test_the_byte_cap_is_for_each_prompt_of_a_batch() -> None:
    with a_world() as world:
        prompts = ["h" * 300] * 100  # more bytes together than one prompt may have
        reply = world.complete(prompt=prompts, max_tokens=1)
        assert reply.status_code == 200
        assert len(reply.json()["choices"]) == 100
        reply = world.complete(prompt=["h", "h" * 20_000])
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_long_reply_stops_no_other() -> None:
    """Log-probabilities are encoded as tokens come, not all of them at the end."""
    with a_world(Script("hello world" * 10, frames=(1,))) as world:
        beats: list[float] = []

        async def beat() -> None:
            while True:
                beats.append(time.monotonic())
                await asyncio.sleep(0.002)

        task = asyncio.run_coroutine_threadsafe(beat(), world.loop)
        reply = world.chat(n=128, max_tokens=80, logprobs=True, top_logprobs=20)
        task.cancel()
        assert len(reply.json()["choices"][127]["logprobs"]["content"]) == 80
        # the rows of a frame take some 10 ms; all 10,240 tokens at the end took most of a second
        assert max(b - a for a, b in itertools.pairwise(beats)) < 0.25


def test_who_waits_for_the_first_replica_hears_no_address_and_may_leave() -> None:
    with a_world(queue_timeout_s=0.3) as world:
        world.plane.cards_now = []
        world.plane.ready = (False, "no replica is connected: ('127.0.0.1', 7600)")
        reply = world.complete()
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["error"]["message"] == "No replica of model 'tiny' has started yet."
        assert world.get("/health").headers["retry-after"] == "1"
    with a_world(queue_timeout_s=60) as world:
        world.plane.cards_now = []
        with socket.create_connection(("127.0.0.1", world.port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            until(lambda: world.gateway.admission.num_preparing == 1)
        until(lambda: world.gateway.admission.num_preparing == 0, 1.0)
