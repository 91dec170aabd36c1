"""Parsed request bodies: types that cannot be wrong.

Everything that can be decided without the tokenizer is decided here; what needs prompt lengths
(the context limit) is decided in admission.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidRequest, UnsupportedParameter
from serving.gateway.fields import Limits, shown, text, token_id, wrong, wrong_type
from serving.gateway.schema import CHAT, COMPLETION, check, refuse_suspect
from serving.types import NO_LOGPROBS, SamplingParams
from serving.wire import pack_ids

MAX_CHOICES = 1024
"""Prompts times n of one request."""
MAX_MESSAGES = 4096
MIN_TEMPERATURE = 1e-5
"""Below it a division by the temperature overflows; sampling is argmax long before."""

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How each prompt is continued: the same for every choice of a request."""

    model: str | None
    n: int
    sampling: SamplingParams  # seed, choice and max_tokens are set per choice, at admission
    seed: int | None
    max_tokens: int | None  # None = the rest of the context
    stop: tuple[str, ...]
    include_stop: bool  # the matched stop string stays in the text
    skip_special_tokens: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None  # keep this many at the prompt's end; -1 = what fits
    return_token_ids: bool
    tokens_as_ids: bool  # logprobs name tokens "token_id:N"
    priority: int  # higher is served first
    cache_salt: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    ignored: tuple[str, ...]

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, None = no logprobs at all."""
        return None if self.sampling.logprobs == NO_LOGPROBS else self.sampling.logprobs


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionBody:
    """prompts: text, or int32 token-id bytes; never empty. None = the start of a document."""

    prompts: tuple[str | bytes | None, ...]
    generation: Generation


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, its text parts joined."""

    role: str  # one of ROLES; "developer" is a system message to templates
    content: str
    name: str | None = None
    tool_call_id: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ChatBody:
    messages: tuple[Message, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]
    generation: Generation


def parse_completion(body: Any, limits: Limits, is_lenient: bool = False) -> CompletionBody:
    """The body of POST /v1/completions, decoded. Raises InvalidRequest and its kin."""
    checked = check(COMPLETION, body, limits, is_lenient)
    values = checked.values
    logprobs = NO_LOGPROBS if values["logprobs"] is None else values["logprobs"]
    generation = _generation(values, logprobs, values["max_tokens"], checked.ignored)
    prompts = _prompts(values["prompt"], limits)
    _check_num_choices(len(prompts), generation.n)
    refuse_suspect(body)
    return CompletionBody(prompts, generation)


def parse_chat(body: Any, limits: Limits, is_lenient: bool = False) -> ChatBody:
    """The body of POST /v1/chat/completions, decoded. Raises InvalidRequest and its kin."""
    checked = check(CHAT, body, limits, is_lenient)
    values = checked.values
    if values["top_logprobs"] and not values["logprobs"]:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    if values["continue_final_message"] and values["add_generation_prompt"]:
        if (body.get("add_generation_prompt")) is True:
            message = "'add_generation_prompt' and 'continue_final_message' cannot both be true."
            raise InvalidRequest(message, param="continue_final_message")
        values["add_generation_prompt"] = False
    old, new = values["max_tokens"], values["max_completion_tokens"]
    if old is not None and new is not None and old != new:
        message = f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ; send only 'max_completion_tokens'."
        raise InvalidRequest(message, param="max_tokens")
    logprobs = values["top_logprobs"] if values["logprobs"] else NO_LOGPROBS
    generation = _generation(values, logprobs, new if new is not None else old, checked.ignored)
    messages = _messages(values["messages"])
    if values["continue_final_message"] and messages[-1].role != "assistant":
        message = "'continue_final_message' needs a last message of role 'assistant'."
        raise InvalidRequest(message, param="continue_final_message")
    _check_num_choices(1, generation.n)
    refuse_suspect(body)
    return ChatBody(
        messages,
        values["add_generation_prompt"],
        values["continue_final_message"],
        values["chat_template_kwargs"],
        generation,
    )


def _generation(
    values: Mapping[str, Any], logprobs: int, max_tokens: int | None, ignored: tuple[str, ...]
) -> Generation:
    if values["stream_options"] is not None and not values["stream"]:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    if max_tokens is not None and values["min_tokens"] > max_tokens:
        raise wrong("min_tokens", f"at most max_tokens ({max_tokens})", values["min_tokens"])
    if values["truncate_prompt_tokens"] == 0:
        raise wrong("truncate_prompt_tokens", "-1 or an integer from 1", 0)
    temperature = values["temperature"]
    options = values["stream_options"] or ()
    return Generation(
        model=values["model"],
        n=values["n"],
        sampling=SamplingParams(
            temperature=0.0 if temperature < MIN_TEMPERATURE else temperature,
            top_p=values["top_p"],
            top_k=max(values["top_k"], 0),
            min_p=values["min_p"],
            frequency_penalty=values["frequency_penalty"],
            presence_penalty=values["presence_penalty"],
            repetition_penalty=values["repetition_penalty"],
            logit_bias=values["logit_bias"],
            min_tokens=values["min_tokens"],
            ignore_eos=values["ignore_eos"],
            stop_token_ids=values["stop_token_ids"],
            logprobs=logprobs,
            allowed_token_ids=values["allowed_token_ids"],
        ),
        seed=values["seed"],
        max_tokens=max_tokens,
        stop=values["stop"],
        include_stop=values["include_stop_str_in_output"],
        skip_special_tokens=values["skip_special_tokens"],
        add_special_tokens=values["add_special_tokens"],
        truncate_prompt_tokens=values["truncate_prompt_tokens"],
        return_token_ids=values["return_token_ids"],
        tokens_as_ids=values["return_tokens_as_token_ids"],
        priority=-values["priority"],  # vLLM's clients send lower for sooner
        cache_salt=values["cache_salt"],
        stream=values["stream"],
        include_usage="include_usage" in options,
        continuous_usage="continuous_usage_stats" in options,
        ignored=ignored,
    )


def _check_num_choices(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_CHOICES:
        given = f"{num_prompts} prompts with n = {n}"
        message = f"A request may have at most {MAX_CHOICES} choices (prompts times n), got {given}."
        raise InvalidRequest(message, param="n" if num_prompts == 1 else "prompt")


def _prompts(value: Any, limits: Limits) -> tuple[str | bytes | None, ...]:
    """One prompt or several; text or ids, never both."""
    kinds = "a string, an array of strings, an array of token ids or an array of arrays of token ids"
    if value is None:
        return (None,)
    if isinstance(value, str):
        return (_text_prompt(value),)
    if not isinstance(value, list):
        raise wrong_type("prompt", kinds, value)
    if not value:
        raise wrong("prompt", "at least one prompt", value)
    if isinstance(value[0], (str, list)):
        if len(value) > MAX_CHOICES:
            raise wrong("prompt", f"at most {MAX_CHOICES} prompts", value)
        if isinstance(value[0], str) and all(isinstance(item, str) for item in value):
            return tuple(_text_prompt(item) for item in value)
        if isinstance(value[0], list) and all(isinstance(item, list) for item in value):
            return tuple(_id_prompt(item, limits) for item in value)
        raise wrong_type("prompt", f"{kinds}, not a mixture", value)
    return (_id_prompt(value, limits),)


def _text_prompt(value: str) -> str:
    if not text("prompt", value):
        raise wrong("prompt", "text that is not empty (null is the start of a document)", value)
    return value


def _id_prompt(value: list[Any], limits: Limits) -> bytes:
    if not value:
        raise wrong("prompt", "at least one token id", value)
    # At C speed: a body of two megabytes is a million ids, and the event loop checks them.
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) >= limits.tokenizer_size:
        for item in value:
            token_id("prompt", item, limits)
    return pack_ids(value)


def _messages(value: Any) -> tuple[Message, ...]:
    if value is None:
        raise InvalidRequest("Missing required parameter: 'messages'.", param="messages", code="missing_parameter")
    if not isinstance(value, list):
        raise wrong_type("messages", "an array of messages", value)
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise wrong("messages", f"1 to {MAX_MESSAGES} messages", value)
    return tuple(_message(f"messages[{at}]", item) for at, item in enumerate(value))


def _message(param: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object with role and content", value)
    for name, item in value.items():
        if name not in ("role", "content", "name", "tool_call_id") and item is not None:
            inner = f"{param}.{name[:64]}"
            raise UnsupportedParameter(f"Unsupported parameter: '{inner}'.", param=inner)
    role = value.get("role")
    if not isinstance(role, str):
        raise wrong_type(f"{param}.role", f"one of {', '.join(ROLES)}", role)
    if role not in ROLES:
        raise wrong(f"{param}.role", f"one of {', '.join(ROLES)}", role)
    name, call = value.get("name"), value.get("tool_call_id")
    return Message(
        role,
        _content(f"{param}.content", value.get("content")),
        None if name is None else text(f"{param}.name", name, 256),
        None if call is None else text(f"{param}.tool_call_id", call, 256),
    )


def _content(param: str, value: Any) -> str:
    if not isinstance(value, list):
        return text(param, value)
    if not value:
        raise wrong(param, "at least one part", value)
    parts = []
    for at, part in enumerate(value):
        inner = f"{param}[{at}]"
        if not isinstance(part, dict):
            raise wrong_type(inner, "an object with type and text", part)
        if part.get("type") != "text":
            message = f"Unsupported content: '{inner}.type' must be \"text\", got {shown(part.get('type'))}."
            raise UnsupportedParameter(message, param=f"{inner}.type")
        for name, item in part.items():
            if name not in ("type", "text") and item is not None:
                unknown = f"{inner}.{name[:64]}"
                raise UnsupportedParameter(f"Unsupported parameter: '{unknown}'.", param=unknown)
        parts.append(text(f"{inner}.text", part.get("text")))
    return "\n".join(parts)
