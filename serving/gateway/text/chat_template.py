"""Messages to a prompt, by the template that comes with the model."""

from __future__ import annotations

import datetime
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from serving.errors import InvalidRequest, ModelLoadError
from serving.gateway.text.template_sandbox import SandboxedTemplate, TemplateLimitError
from serving.gateway.text.tokenizer import Tokenizer, read_assets

MAX_TEMPLATE_BYTES = 1 << 20
KWARGS = frozenset({"enable_thinking", "thinking", "reasoning_effort", "documents", "tools", "date_string"})
"""What a request may pass to a template, besides the messages."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

Message = Mapping[str, Any]
"""{"role": str, "content": str | None | [{"type": "text", "text": str}, …], …}"""


class ChatTemplate:
    """The chat template of one model, compiled once. Thread-safe."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str],
        tokenizer: Tokenizer,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """source: None = the model has none, and every rendering is refused.

        Raises ModelLoadError when it does not compile.
        """
        if source is not None and len(source) > MAX_TEMPLATE_BYTES:
            raise ModelLoadError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_BYTES} are allowed"
            )
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._knows_developer = source is not None and "developer" in source
        try:
            # Marks and private names make guarded text longer than it will be: the cap proper is the tokenizer's.
            size = 16 * tokenizer.max_prompt_bytes
            self._template = None if source is None else SandboxedTemplate(source, size, now)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template does not compile: {error}") from None

    @classmethod
    def from_assets(cls, assets: Path | Mapping[str, bytes], tokenizer: Tokenizer) -> ChatTemplate:
        """Template and special tokens out of chat_template.jinja and tokenizer_config.json.

        Raises ModelLoadError when they cannot be read.
        """
        files = read_assets(assets) if isinstance(assets, Path) else assets
        try:
            config = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"), type=dict)
            source = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else _named(config)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"tokenizer_config.json or chat_template.jinja cannot be read: {error}") from None
        special = {name: _content(config.get(name)) for name in _SPECIAL_TOKENS}
        return cls(source, {name: token for name, token in special.items() if token is not None}, tokenizer)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text.

        add_generation_prompt: end with the beginning of an assistant's turn. continue_final_message: end within
        the last message, exactly where its content ends. kwargs: further variables, names out of `KWARGS`.
        Raises InvalidRequest naming what is wrong with the messages.
        """
        guarded = self._render(messages, add_generation_prompt, continue_final_message, kwargs or {})
        return self._tokenizer.special_text.unguard(guarded)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> array[int]:
        """The prompt as token ids (int32). Special text in messages stays text. Raises as `render`."""
        guarded = self._render(messages, add_generation_prompt, continue_final_message, kwargs or {})
        return self._tokenizer.encode_guarded(guarded)

    async def encode_async(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> array[int]:
        """`encode` in one of the tokenizer's threads. Raises as `render` and `Tokenizer.run`."""
        return await self._tokenizer.run(
            lambda: self.encode(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                kwargs=kwargs,
            )
        )

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions with a prompt", param="messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
            )
        unknown = sorted(set(kwargs) - KWARGS)
        if unknown:
            raise InvalidRequest(
                f"chat_template_kwargs.{unknown[0]} is not supported ({', '.join(sorted(KWARGS))} are)",
                param="chat_template_kwargs",
            )
        if not messages:
            raise InvalidRequest("messages must hold at least one message, not 0", param="messages")
        turns = [self._turn(message, place) for place, message in enumerate(messages)]
        cut = self._tokenizer.special_text.cut
        if continue_final_message:
            turns[-1]["content"] += cut
        try:
            prompt = self._template.render(
                {
                    "tools": None,  # templates ask whether these are none, not whether they are defined
                    "documents": None,
                    **self._special_tokens,
                    **self._tokenizer.special_text.guard(dict(kwargs)),
                    "messages": turns,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except TemplateLimitError as error:
            raise InvalidRequest(f"messages: {error}", param="messages") from None
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {self._tokenizer.special_text.unguard(reason)}",
                param="messages",
            ) from None
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
            # A template that meets a message it was not written for. The exception's text may quote the message.
            raise InvalidRequest(
                f"messages do not fit the model's chat template ({type(error).__name__})", param="messages"
            ) from None
        if not continue_final_message:
            return prompt
        end = prompt.rfind(cut)
        if end < 0:
            raise InvalidRequest(
                "continue_final_message: the model's chat template does not show the last message",
                param="continue_final_message",
            )
        return prompt[:end]

    def _turn(self, message: Message, place: int) -> dict[str, Any]:
        """The message as templates want it: content is text, strings are guarded."""
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequest(f"messages[{place}].role must be a non-empty string", param=f"messages[{place}].role")
        if role == "developer" and not self._knows_developer:
            role = "system"
        content = _joined(message.get("content"), f"messages[{place}].content")
        self._tokenizer.check_text(content, f"messages[{place}].content")
        guarded: dict[str, Any] = self._tokenizer.special_text.guard({**message, "role": role, "content": content})
        return guarded


def _joined(content: Any, param: str) -> str:
    """Text parts, one per line."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{param} must be a string or a list of text parts", param=param)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"{param}[{place}] is of type {str(kind)[:64]!r}; only parts of type 'text' are supported",
                param=f"{param}[{place}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _named(config: Mapping[str, Any]) -> str | None:
    """`chat_template` of an older tokenizer_config.json: the text, or a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object with its text."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
