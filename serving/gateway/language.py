"""What turns text into one model's token ids and back: its tokenizer and chat template."""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from serving.errors import ContextLengthExceeded, EngineError, ModelLoadError
from serving.gateway.bodies import ChatBody, CompletionBody
from serving.gateway.text.chat_template import ChatTemplate
from serving.gateway.text.tokenizer import ASSETS, Tokenizer, max_prompt_bytes
from serving.types import ModelCard
from serving.wire import unpack_ids

MAX_LANGUAGES = 4
"""Models kept in memory; the least recently used leaves."""

Tokens: TypeAlias = "array[int]"


class AssetSource(Protocol):
    """Where a model's files come from (C23)."""

    async def asset(self, card: ModelCard, name: str) -> Path: ...


class Language:
    """One model's tokenizer and template."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self._template = template

    @classmethod
    async def load(cls, card: ModelCard, source: AssetSource) -> Language:
        """Fetch and compile. Raises EngineError when the model's files are unfit, NoCapacity when no
        replica delivers them."""
        paths = {name: await source.asset(card, name) for name in ASSETS if name in card.assets}
        try:
            return await asyncio.to_thread(cls._compile, card, paths)
        except ModelLoadError as error:
            raise EngineError(f"The tokenizer of model '{card.model}' is unfit: {error}") from None

    @classmethod
    def _compile(cls, card: ModelCard, paths: dict[str, Path]) -> Language:
        assets = {name: path.read_bytes() for name, path in paths.items()}
        if "tokenizer.json" not in assets:
            raise ModelLoadError("tokenizer.json is missing")
        limit = max_prompt_bytes(card.max_model_len)
        tokenizer = Tokenizer.from_assets(assets, tokenizer_size=card.tokenizer_size, max_prompt_bytes=limit)
        return cls(card, tokenizer, ChatTemplate.from_assets(assets, tokenizer))

    async def encode_prompts(self, body: CompletionBody) -> list[Tokens]:
        """Token ids of every prompt. Raises ContextLengthExceeded above the byte cap, before tokenising."""
        texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
        add_special_tokens = body.generation.add_special_tokens
        for text in texts:
            self._check_bytes([text], "prompt")
        if len(texts) == 1:
            return [await self.tokenizer.encode_async(texts[0], add_special_tokens=add_special_tokens)]
        if texts:
            return await self.tokenizer.encode_batch_async(texts, add_special_tokens=add_special_tokens)
        return [self._document_start() if ids is None else _ids(ids) for ids in body.prompts]

    async def encode_chat(self, body: ChatBody) -> Tokens:
        """Token ids of a conversation; special text in messages stays text."""
        self._check_bytes([message.content for message in body.messages], "messages")
        messages = []
        for message in body.messages:
            turn = {"role": message.role, "content": message.content}
            if message.name is not None:
                turn["name"] = message.name
            if message.tool_call_id is not None:
                turn["tool_call_id"] = message.tool_call_id
            messages.append(turn)
        return await self._template.encode_async(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            kwargs=body.template_kwargs,
        )

    def _check_bytes(self, texts: Sequence[str], param: str) -> None:
        """Refuse a text that no prompt of this model could be."""
        limit = self.tokenizer.max_prompt_bytes
        size = sum(map(len, texts))
        if size * 4 > limit:  # no character has more than four bytes: the exact count only near the limit
            size = sum(len(text.encode()) for text in texts)
            if size > limit:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {self.card.max_model_len} tokens, "
                    f"but the text has {size} bytes; at most {limit} are tokenised.",
                    param=param,
                )

    def _document_start(self) -> Tokens:
        """OpenAI's default prompt: the token that begins a document."""
        first = self.card.bos_id if self.card.bos_id is not None else next(iter(self.card.eos_ids), 0)
        return array("i", [first])

    def close(self) -> None:
        self.tokenizer.close()


def _ids(packed: str | bytes) -> Tokens:
    assert isinstance(packed, bytes)  # the parser lets no mixture through
    return unpack_ids(packed)


class Languages:
    """Languages of the served models, loaded once each."""

    def __init__(self, load: Callable[[ModelCard], Awaitable[Language]]) -> None:
        self._load = load
        self._loaded: OrderedDict[str, asyncio.Future[Language]] = OrderedDict()

    async def of(self, card: ModelCard) -> Language:
        """The language of a card. Concurrent callers share one load; a failed one is tried again.
        Raises as `Language.load`."""
        task = self._loaded.get(card.fingerprint)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._loaded[card.fingerprint] = asyncio.ensure_future(self._load(card))
            while len(self._loaded) > MAX_LANGUAGES:
                _, old = self._loaded.popitem(last=False)
                _close(old)
        self._loaded.move_to_end(card.fingerprint)
        return await asyncio.shield(task)

    def close(self) -> None:
        for task in self._loaded.values():
            _close(task)
        self._loaded.clear()


def _close(task: asyncio.Future[Language]) -> None:
    if not task.done():
        task.cancel()
    elif not task.cancelled() and task.exception() is None:
        task.result().close()
