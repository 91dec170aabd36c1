"""The parameters of the generation endpoints: one table drives validation and /v1/capabilities.

A parameter is *honoured* (checked and obeyed), *inert* (checked, carries no behaviour) or *refused*
(known, and accepted only at a value that asks for nothing). Anything else is refused by name. null
means the default everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from serving.errors import InvalidJson, InvalidRequest, UnsupportedParameter
from serving.gateway.fields import (
    Bool,
    Float,
    Int,
    Kind,
    Limits,
    LogitBias,
    Metadata,
    Raw,
    Stop,
    Str,
    StreamOptions,
    TemplateKwargs,
    TokenIds,
    is_same,
    shown,
    wrong_type,
)
from serving.gateway.strict_json import Suspect

Status = Literal["honoured", "inert", "refused"]
Origin = Literal["openai", "vllm"]

MAX_NAME_LEN = 64
MAX_PARAMETERS = 256
"""Members of a body. Lenient callers may send names that nobody knows, but not a hundred thousand."""


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One parameter of one endpoint."""

    name: str
    status: Status
    origin: Origin
    kind: Kind | None = None  # of a refused parameter: none
    default: Any = None
    neutral: tuple[Any, ...] = ()  # of a refused parameter: values beside null that ask for nothing

    def describe(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"status": self.status, "origin": self.origin}
        if self.kind is not None:
            entry |= self.kind.describe() | {"default": self.default}
        else:
            entry["accepted_values"] = [None, *self.neutral]
        return entry


def _honoured(name: str, kind: Kind, default: Any = None, origin: Origin = "openai") -> Field:
    return Field(name, "honoured", origin, kind, default)


def _inert(name: str, kind: Kind, origin: Origin = "openai") -> Field:
    return Field(name, "inert", origin, kind)


def _refused(name: str, *neutral: Any, origin: Origin = "openai") -> Field:
    return Field(name, "refused", origin, neutral=neutral)


_SHARED = (
    _honoured("model", Str(256)),
    _honoured("frequency_penalty", Float(-2, 2), 0.0),
    _honoured("presence_penalty", Float(-2, 2), 0.0),
    _honoured("logit_bias", LogitBias(), ()),
    _honoured("max_tokens", Int(0, 2**63 - 1)),
    _honoured("n", Int(1, 128), 1),
    _honoured("seed", Int(-(2**63), 2**63 - 1)),
    _honoured("stop", Stop(), ()),
    _honoured("stream", Bool(), False),
    _honoured("stream_options", StreamOptions()),
    _honoured("temperature", Float(0, 2), 1.0),
    _honoured("top_p", Float(0, 1), 1.0),
    _honoured("top_k", Int(-1, 2**31 - 1), 0, "vllm"),
    _honoured("min_p", Float(0, 1), 0.0, "vllm"),
    _honoured("repetition_penalty", Float(0, 2, excludes_low=True), 1.0, "vllm"),
    _honoured("min_tokens", Int(0, 2**31 - 1), 0, "vllm"),
    _honoured("ignore_eos", Bool(), False, "vllm"),
    _honoured("stop_token_ids", TokenIds(128), (), "vllm"),
    _honoured("allowed_token_ids", TokenIds(4096, 1), None, "vllm"),
    _honoured("include_stop_str_in_output", Bool(), False, "vllm"),
    _honoured("skip_special_tokens", Bool(), True, "vllm"),
    _honoured("truncate_prompt_tokens", Int(-1, 2**31 - 1), None, "vllm"),
    _honoured("return_token_ids", Bool(), False, "vllm"),
    _honoured("return_tokens_as_token_ids", Bool(), False, "vllm"),
    _honoured("priority", Int(-1000, 1000), 0, "vllm"),
    _honoured("cache_salt", Str(128, "@/\\\0"), "", "vllm"),
    _inert("user", Str(4096)),
    _inert("metadata", Metadata()),
    _inert("safety_identifier", Str(4096)),
    _inert("prompt_cache_key", Str(4096)),
    _refused("store", False),
    _refused("service_tier", "auto", "default"),
    _refused("response_format", {"type": "text"}),
    _refused("echo", False),
    _refused("spaces_between_special_tokens", True, origin="vllm"),
    _refused("bad_words", [], origin="vllm"),
    _refused("prompt_logprobs", origin="vllm"),
    _refused("logprob_token_ids", [], origin="vllm"),
    _refused("structured_outputs", origin="vllm"),
    _refused("request_id", origin="vllm"),
    _refused("session_id", origin="vllm"),
    _refused("stream_interval", 1, origin="vllm"),
    _refused("use_beam_search", False, origin="vllm"),
    _refused("length_penalty", 1.0, origin="vllm"),
)

COMPLETION: Mapping[str, Field] = {
    field.name: field
    for field in (
        *_SHARED,
        _honoured("prompt", Raw(("string", "array"))),
        _honoured("max_tokens", Int(0, 2**63 - 1), 16),
        _honoured("logprobs", Int(0, 20)),
        _honoured("add_special_tokens", Bool(), True, "vllm"),
        _refused("best_of", 1),
        _refused("suffix", ""),
    )
}

CHAT: Mapping[str, Field] = {
    field.name: field
    for field in (
        *_SHARED,
        _honoured("messages", Raw(("array",))),
        _honoured("max_tokens", Int(1, 2**63 - 1)),
        _honoured("max_completion_tokens", Int(1, 2**63 - 1)),
        _honoured("logprobs", Bool(), False),
        _honoured("top_logprobs", Int(0, 20), 0),
        _honoured("add_special_tokens", Bool(), False, "vllm"),
        _honoured("add_generation_prompt", Bool(), True, "vllm"),
        _honoured("continue_final_message", Bool(), False, "vllm"),
        _honoured("chat_template_kwargs", TemplateKwargs(), {}, "vllm"),
        _refused("tools"),
        _refused("tool_choice", "none"),
        _refused("parallel_tool_calls", True),
        _refused("functions"),
        _refused("function_call", "none"),
        _refused("reasoning_effort", "none"),
        _refused("prompt_cache_retention", "in_memory"),
        _refused("prompt_cache_options"),
        _refused("prediction"),
        _refused("verbosity", "medium"),
        _refused("modalities", ["text"]),
        _refused("audio"),
        _refused("moderation"),
        _refused("web_search_options"),
        _refused("chat_template", origin="vllm"),
        _refused("documents", [], origin="vllm"),
        _refused("include_reasoning", True, origin="vllm"),
        _refused("return_prompt_text", False, origin="vllm"),
    )
}

ENDPOINTS: Mapping[str, Mapping[str, Field]] = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def capabilities() -> dict[str, Any]:
    """What `GET /v1/capabilities` says: every parameter with its status, type and limits."""
    return {
        "object": "capabilities",
        "endpoints": {
            path: {"parameters": {name: fields[name].describe() for name in sorted(fields)}}
            for path, fields in ENDPOINTS.items()
        },
        "seed": "a choice samples with (seed, its index in the whole request, position): the same request gives the "
        "same bytes, a prompt in an array of prompts samples otherwise than the same prompt alone",
        "unknown_parameters": "refused; with the header 'x-argosy-lenient: 1' ignored and listed in x-argosy-ignored",
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """Honoured parameters by name, defaults filled in; and what a lenient caller had ignored."""

    values: dict[str, Any]
    ignored: tuple[str, ...]


def check(fields: Mapping[str, Field], body: Any, limits: Limits, is_lenient: bool = False) -> Checked:
    """Check every parameter of a decoded body by its table.

    Raises UnsupportedParameter for an unknown parameter or one that is not honoured (unless
    is_lenient), InvalidRequest for a wrong type or value.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(f"The request body must be a JSON object, got {shown(body)}.", code="invalid_type")
    if len(body) > MAX_PARAMETERS:
        raise InvalidRequest(f"A request may have at most {MAX_PARAMETERS} parameters, got {len(body)}.")
    values = {name: field.default for name, field in fields.items() if field.status == "honoured"}
    ignored = []
    for name, value in body.items():
        field = fields.get(name)
        if field is not None and field.kind is not None:
            if value is None:
                continue
            checked = field.kind.check(name, value, limits)
            if field.status == "honoured":
                values[name] = checked
        elif field is not None and (value is None or any(is_same(value, neutral) for neutral in field.neutral)):
            continue
        elif is_lenient:
            ignored.append(name)
        else:
            raise _unsupported(name, field, value)
    return Checked(values, tuple(ignored))


def refuse_suspect(body: Any) -> None:
    """Last, when no field's own check has found the fault. Raises InvalidJson."""
    if isinstance(body, Suspect):
        raise InvalidJson("The request body is not valid JSON: it has a number or a string that JSON cannot carry.")


def _unsupported(name: str, field: Field | None, value: object) -> UnsupportedParameter:
    if field is None:
        message = f"Unsupported parameter: {shown(name)} is not known to this endpoint."
    else:
        accepted = ", ".join(shown(item) if not isinstance(item, (dict, list)) else str(item) for item in field.neutral)
        only = f" other than {accepted}" if accepted else ""
        message = f"Unsupported parameter: '{name}' is not supported{only}, got {shown(value)}."
    return UnsupportedParameter(message, param=name[:MAX_NAME_LEN])


def model_name(body: Any) -> str | None:
    """The model that a body asks for, before anything else is known of it; None = the served one."""
    name = body.get("model") if isinstance(body, dict) else None
    if name is not None and not isinstance(name, str):
        raise wrong_type("model", "a string", name)
    return name
