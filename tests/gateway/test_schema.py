"""Every parameter is honoured, inert or refused by name; nothing is silently ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from serving.errors import InvalidRequest, UnsupportedParameter
from serving.gateway.bodies import MAX_CHOICES, ChatBody, CompletionBody, parse_chat, parse_completion
from serving.gateway.fields import Limits
from serving.gateway.schema import CHAT, COMPLETION, capabilities
from serving.gateway.strict_json import decode
from serving.types import NO_LOGPROBS
from serving.wire import pack_ids

LIMITS = Limits(tokenizer_size=50257, max_model_len=2048)
MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**body: Any) -> CompletionBody:
    return parse_completion({"prompt": "hi"} | body, LIMITS)


def chat(**body: Any) -> ChatBody:
    return parse_chat({"messages": MESSAGES} | body, LIMITS)


BAD = [
    ("n", 129), ("n", 0), ("n", 5_000_000), ("n", True), ("n", "5"), ("n", 2.0), ("n", [1]),
    ("max_tokens", -1), ("max_tokens", 2**63), ("max_tokens", 1.5), ("max_tokens", True),
    ("temperature", -1), ("temperature", 2.01), ("temperature", "1"), ("temperature", True), ("temperature", -0.0),
    ("temperature", 10**400),
    ("top_p", 1.1), ("top_p", -0.1), ("min_p", 1.01), ("min_p", -1), ("top_k", -2), ("top_k", 1.0), ("top_k", 2**31),
    ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 2.1),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.0), ("seed", "1"),
    ("stop", ["a", "b", "c", "d", "e"]), ("stop", ""), ("stop", ["a", ""]), ("stop", "x" * 257), ("stop", 5),
    ("stop", [5]), ("stop", ["\ud800"]), ("stop", {}), ("stop", ["x"] * 500_000),
    ("logit_bias", {"-1": 1}), ("logit_bias", {"50257": 1}), ("logit_bias", {"1.0": 1}), ("logit_bias", {" 1": 1}),
    ("logit_bias", {"01": 1}), ("logit_bias", {"٣": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": -101}),
    ("logit_bias", {"1": True}), ("logit_bias", {"1": None}), ("logit_bias", []),
    ("logit_bias", {str(key): 1 for key in range(1025)}),
    ("stream", 1), ("stream", "true"), ("stream_options", []), ("stream_options.include_usage", {"include_usage": 1}),
    ("min_tokens", -1), ("min_tokens", 17), ("ignore_eos", 1), ("stop_token_ids", [50257]), ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]), ("stop_token_ids", 5), ("stop_token_ids", list(range(129))),
    ("allowed_token_ids", []), ("allowed_token_ids", [2**40]), ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2), ("cache_salt", "a@b"), ("cache_salt", "x" * 129), ("priority", 1001),
    ("user", 5), ("user", "\ud800"), ("metadata", {"a": 1}), ("metadata", {str(i): "" for i in range(17)}),
    ("model", 5),
]  # fmt: skip
BAD_COMPLETION = [
    ("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("logprobs", 50257),
    ("prompt", ""), ("prompt", []), ("prompt", [""]), ("prompt", [[]]), ("prompt", ["a", 1]), ("prompt", ["a", [1]]),
    ("prompt", [1, "a"]), ("prompt", [[1], 1]), ("prompt", [[1], "a"]), ("prompt", [-1]), ("prompt", [50257]),
    ("prompt", [2**40]), ("prompt", [1.0]), ("prompt", [True]), ("prompt", [None]), ("prompt", {}), ("prompt", 1),
    ("prompt", [["a"]]), ("prompt", [[[1]]]), ("prompt", "\ud800"), ("prompt", ["ok", "\udc00"]),
    ("prompt", ["a"] * 10_000), ("prompt", [[1, -1]]),
]  # fmt: skip
BAD_CHAT: list[tuple[str, Any]] = [
    ("messages", None), ("messages", []), ("messages", "hi"), ("messages[0]", [1]), ("messages[0].role", [{}]),
    ("messages[0].role", [{"role": "root", "content": ""}]), ("messages[0].role", [{"role": 1, "content": ""}]),
    ("messages[0].content", [{"role": "user"}]), ("messages[0].content", [{"role": "user", "content": 1}]),
    ("messages[0].content", [{"role": "user", "content": []}]),
    ("messages[0].content", [{"role": "user", "content": "\ud800"}]),
    ("messages[0].content[0]", [{"role": "user", "content": ["hi"]}]),
    ("messages[1].content[0].type", [*MESSAGES, {"role": "user", "content": [{"type": "image_url"}]}]),
    ("messages[0].tool_calls", [{"role": "assistant", "content": "", "tool_calls": [{}]}]),
    ("messages[0].name", [{"role": "user", "content": "", "name": 5}]),
    ("logprobs", 5), ("top_logprobs", 21), ("top_logprobs", 1), ("max_completion_tokens", 0), ("max_tokens", 0),
    ("chat_template_kwargs", 1), ("chat_template_kwargs.evil", {"evil": True}),
    ("chat_template_kwargs.thinking", {"thinking": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "value"), BAD + BAD_COMPLETION, ids=lambda item: str(item)[:24])
def test_completion_refuses(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        completion(**{param.partition(".")[0]: value})
    assert raised.value.param == param
    assert raised.value.status == 400
    assert len(raised.value.message) < 400
    json.dumps(raised.value.body()).encode()


@pytest.mark.parametrize(("param", "value"), [*BAD_CHAT, *BAD[:8], *BAD[-3:]], ids=lambda item: str(item)[:24])
def test_chat_refuses(param: str, value: Any) -> None:
    field = param.partition("[")[0].partition(".")[0]
    with pytest.raises(InvalidRequest) as raised:
        chat(**{field: value})
    assert raised.value.param == param


def test_errors_say_the_limit_and_what_was_given() -> None:
    with pytest.raises(InvalidRequest, match="'n': expected an integer from 1 to 128, got 129"):
        completion(n=129)
    with pytest.raises(InvalidRequest, match="token ids from 0 to 50256, got 50257"):
        completion(prompt=[50257])


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999", "1" + "0" * 5000])
@pytest.mark.parametrize("param", ["temperature", "n", "seed", "frequency_penalty", "logprobs", "prompt", "user"])
def test_numbers_that_json_lacks_are_blamed_on_their_parameter(param: str, literal: str) -> None:
    body = decode(b'{"model": "m", "%s": %s}' % (param.encode(), literal.encode()))
    with pytest.raises(InvalidRequest) as raised:
        parse_completion(body, LIMITS)
    assert raised.value.param == param


def test_a_surrogate_where_no_check_looks_is_still_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_completion(decode(b'{"prompt": "hi", "suffix": null, "metadata": {"a": "\\ud800"}}'), LIMITS)
    with pytest.raises(InvalidRequest, match="JSON"):
        parse_completion(decode(b'{"prompt": "hi", "x\\ud800": 1}'), LIMITS, is_lenient=True)


def test_defaults_are_openais() -> None:
    generation = completion().generation
    sampling = generation.sampling
    assert (generation.n, generation.max_tokens, generation.seed, generation.stream) == (1, 16, None, False)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert sampling.logprobs == NO_LOGPROBS
    assert chat().generation.max_tokens is None
    assert chat(max_completion_tokens=5).generation.max_tokens == chat(max_tokens=5).generation.max_tokens == 5


def test_null_is_the_default_everywhere() -> None:
    assert completion(**dict.fromkeys(COMPLETION.keys() - {"prompt"})) == completion()
    assert chat(**dict.fromkeys(CHAT.keys() - {"messages"})) == chat()
    assert completion(prompt=None).prompts == (None,)


def test_prompts_of_every_shape() -> None:
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[1, 2]).prompts == (pack_ids([1, 2]),)
    assert completion(prompt=[[1], [2, 3]]).prompts == (pack_ids([1]), pack_ids([2, 3]))


def test_prompts_times_n_is_bounded() -> None:
    assert completion(prompt=["a"] * 8, n=128).generation.n == 128
    with pytest.raises(InvalidRequest, match=str(MAX_CHOICES)):
        completion(prompt=["a"] * 9, n=128)


def test_legal_extremes() -> None:
    generation = completion(
        temperature=1e-300, top_p=0, top_k=-1, max_tokens=0, logprobs=0, seed=-1, stop=["ab", "ab"], priority=5,
        logit_bias={"7": -100, "3": 100.0},
    ).generation  # fmt: skip
    assert generation.sampling.temperature == 0.0
    assert generation.sampling.top_k == 0
    assert generation.sampling.logit_bias == ((3, 100.0), (7, -100.0))
    assert generation.num_logprobs == 0
    assert generation.stop == ("ab",)
    assert generation.priority == -5
    assert completion().generation.num_logprobs is None


NEUTRAL = [
    {"best_of": 1}, {"echo": False}, {"suffix": None}, {"response_format": {"type": "text"}}, {"service_tier": "auto"},
    {"store": False}, {"user": "u"}, {"metadata": {"a": "b"}}, {"safety_identifier": "s"}, {"length_penalty": 1},
    {"use_beam_search": False}, {"bad_words": []},
]  # fmt: skip


@pytest.mark.parametrize("body", NEUTRAL, ids=str)
def test_values_that_ask_for_nothing_are_accepted(body: dict[str, Any]) -> None:
    assert completion(**body) == completion()


NOT_HONOURED = [
    {"best_of": 2}, {"echo": True}, {"suffix": "x"}, {"response_format": {"type": "json_object"}},
    {"service_tier": "flex"}, {"store": True}, {"best_of": True}, {"stream_interval": True}, {"use_beam_search": True},
    {"prompt_logprobs": 1}, {"structured_outputs": {"regex": "(a+)+$"}}, {"foo": 1}, {"__proto__": {}},
    {"messages": MESSAGES}, {"stream": True, "stream_options": {"include_obfuscation": True}},
    {"stream": True, "stream_options": {"foo": False}},
]  # fmt: skip


@pytest.mark.parametrize("body", NOT_HONOURED, ids=str)
def test_what_is_not_honoured_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as raised:
        completion(**body)
    assert raised.value.error_code == "unsupported_parameter"
    assert (raised.value.param or "").partition(".")[0] in body


def test_tools_of_chat_are_refused_by_name() -> None:
    refused: list[dict[str, Any]] = [{"tools": [{}]}, {"tools": []}, {"tool_choice": "auto"}, {"modalities": ["audio"]}]
    for body in refused:
        with pytest.raises(UnsupportedParameter):
            chat(**body)
    assert chat(tools=None, tool_choice="none", modalities=["text"]) == chat()


def test_lenient_callers_learn_what_was_ignored() -> None:
    body = parse_completion({"prompt": "hi", "foo": 1, "best_of": 3, "n": 1}, LIMITS, is_lenient=True)
    assert body.generation.ignored == ("foo", "best_of")
    with pytest.raises(InvalidRequest):  # leniency is about features, not about types
        parse_completion({"prompt": "hi", "n": "1"}, LIMITS, is_lenient=True)


COMPLETION_RULES: list[tuple[dict[str, Any], str]] = [
    ({"stream_options": {}}, "stream_options"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
]
CHAT_RULES: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True}, "continue_final_message"),  # the last message is the user's
    ({"top_logprobs": 5, "logprobs": False}, "top_logprobs"),
]


def test_the_number_of_parameters_is_bounded() -> None:
    body = {"prompt": "hi"} | {f"k{number}": 1 for number in range(256)}
    with pytest.raises(InvalidRequest, match="at most 256 parameters, got 257"):
        parse_completion(body, LIMITS, is_lenient=True)


def test_rules_between_parameters() -> None:
    for body, param in COMPLETION_RULES:
        with pytest.raises(InvalidRequest) as raised:
            completion(**body)
        assert raised.value.param == param
    for body, param in CHAT_RULES:
        with pytest.raises(InvalidRequest) as raised:
            chat(**body)
        assert raised.value.param == param


def test_messages() -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "d", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "tool_calls": None, "name": "x"},
        ],
        continue_final_message=True,
    )
    assert [(message.role, message.content, message.name) for message in body.messages] == [
        ("developer", "d", None), ("user", "a\nb", None), ("assistant", "c", "x"),
    ]  # fmt: skip
    assert body.continue_final_message and not body.add_generation_prompt


@pytest.mark.parametrize(("body", "says"), [(None, "null"), ([], "array"), (5, "5"), ("x", '"x"'), (True, "true")])
def test_a_body_must_be_an_object(body: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_completion(body, LIMITS)


def test_capabilities_name_every_parameter_of_the_official_client() -> None:
    described = capabilities()["endpoints"]
    for path, params in (
        ("/v1/completions", completion_params.CompletionCreateParamsBase),
        ("/v1/chat/completions", chat_params.CompletionCreateParamsBase),
    ):
        official = set(params.__annotations__) | {"stream"}
        assert official <= set(described[path]["parameters"])
    entry = described["/v1/completions"]["parameters"]["n"]
    assert entry == {
        "status": "honoured",
        "origin": "openai",
        "type": "integer",
        "minimum": 1,
        "maximum": 128,
        "default": 1,
    }
    assert described["/v1/completions"]["parameters"]["echo"]["accepted_values"] == [None, False]
    json.dumps(described)
