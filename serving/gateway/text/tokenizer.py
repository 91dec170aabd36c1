"""Text to token ids and back, bounded, off the event loop."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer as RawTokenizer

from serving.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, ModelLoadError, NoCapacity
from serving.gateway.text.detokenizer import Detokenizer, make_detokenizer
from serving.gateway.text.special_text import SpecialText
from serving.gateway.text.vocabulary import Vocabulary

ASSETS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Files of a model folder that the gateway reads; all but the first may be absent."""

MAX_ASSET_BYTES = 64 << 20
MAX_WAITING = 1024
TIMEOUT_S = 10.0

Result = TypeVar("Result")


BYTES_PER_TOKEN = 32
"""Generous text at 8 × 4 bytes per token."""


def max_prompt_bytes(max_model_len: int) -> int:
    """The cap on a prompt's bytes, checked before it is tokenised."""
    return BYTES_PER_TOKEN * max_model_len


def read_assets(folder: Path) -> dict[str, bytes]:
    """The assets present in a model folder. Raises ModelLoadError when one is too large or tokenizer.json absent."""
    assets = {}
    for name in ASSETS:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MAX_ASSET_BYTES:
                raise ModelLoadError(f"{name} has {path.stat().st_size} bytes; at most {MAX_ASSET_BYTES} are allowed")
            assets[name] = path.read_bytes()
    if "tokenizer.json" not in assets:
        raise ModelLoadError(f"{folder.name}: tokenizer.json is missing")
    return assets


class Tokenizer:
    """One model's tokenizer. Thread-safe; the async methods run in threads of its own, which let the loop run."""

    def __init__(
        self,
        raw: RawTokenizer,
        private: RawTokenizer,
        special_text: SpecialText,
        vocabulary: Vocabulary,
        max_prompt_bytes: int,
        num_threads: int,
    ) -> None:
        self._raw = raw
        self._private = private
        self._vocabulary = vocabulary
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._num_waiting = 0
        self.special_text = special_text
        self.max_prompt_bytes = max_prompt_bytes
        self.size = vocabulary.size

    @classmethod
    def from_assets(
        cls,
        assets: Path | Mapping[str, bytes],
        *,
        tokenizer_size: int | None = None,
        max_prompt_bytes: int,
        num_threads: int = 2,
    ) -> Tokenizer:
        """assets: a model folder, or its files by name (C23). tokenizer_size: the card's, when there is one.

        Raises ModelLoadError when tokenizer.json is not one, has ids that the engine masks, or turns plain text
        into special tokens.
        """
        files = read_assets(assets) if isinstance(assets, Path) else assets
        try:
            config: dict[str, Any] = msgspec.json.decode(files["tokenizer.json"], type=dict)
            special_text = SpecialText(config)
            raw = RawTokenizer.from_buffer(files["tokenizer.json"])
            private = RawTokenizer.from_buffer(special_text.private_tokenizer(config))
        except Exception as error:  # the library raises bare Exception for whatever it does not understand
            raise ModelLoadError(f"tokenizer.json cannot be read: {error}") from None
        for tokenizer in (raw, private):  # a folder may have been saved with training's settings
            tokenizer.no_truncation()
            tokenizer.no_padding()
        vocabulary = Vocabulary(raw, config, tokenizer_size or 0)
        if tokenizer_size is not None and vocabulary.size > tokenizer_size:
            raise ModelLoadError(
                f"tokenizer.json has ids up to {vocabulary.size - 1}, "
                f"but the model's tokenizer_size is {tokenizer_size}"
            )
        result = cls(raw, private, special_text, vocabulary, max_prompt_bytes, num_threads)
        result._check_separation(config["model"])
        return result

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> array[int]:
        """Token ids (int32). Special tokens written in the text are parsed.

        Raises InvalidRequest, naming `param`, above the byte cap and for lone surrogates.
        """
        self.check_text(text, param)
        return self._encode(self._raw, text, add_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[array[int]]:
        """Token ids of several texts, each under the byte cap; their sum is the body limit's. Raises as `encode`."""
        for place, text in enumerate(texts):
            self.check_text(text, f"{param}[{place}]")
        encodings = self._raw.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [array("i", encoding.ids) for encoding in encodings]

    def encode_guarded(self, prompt: str, *, param: str = "messages") -> array[int]:
        """Token ids of a prompt that a chat template made of guarded messages (`special_text.guard`).

        Only what the template itself wrote becomes special tokens; nothing is added. Raises as `encode`.
        """
        self.check_text(self.special_text.unguard(prompt), param)
        return self._encode(self._private, self.special_text.reveal(prompt), False)

    async def encode_async(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> array[int]:
        """`encode` in a thread. Also raises NoCapacity when too many wait and DeadlineExceeded."""
        self.check_text(text, param)
        return await self.run(lambda: self._encode(self._raw, text, add_special_tokens))

    async def encode_batch_async(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[array[int]]:
        """`encode_batch` in a thread. Raises as `encode_async`."""
        return await self.run(lambda: self.encode_batch(texts, add_special_tokens=add_special_tokens, param=param))

    async def run(self, work: Callable[[], Result]) -> Result:
        """`work` in one of the tokenizer's threads.

        Raises NoCapacity when `MAX_WAITING` calls wait already, DeadlineExceeded after `TIMEOUT_S`.
        """
        if self._num_waiting >= MAX_WAITING:
            raise NoCapacity(f"{MAX_WAITING} prompts wait to be tokenised", retry_after_s=1.0, reason="saturated")
        self._num_waiting += 1
        future = self._threads.submit(work)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), TIMEOUT_S)
        except TimeoutError:
            raise DeadlineExceeded(f"the prompt could not be tokenised within {TIMEOUT_S:.0f} s") from None
        finally:
            self._num_waiting -= 1

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids: the same function of them as a `detokenizer` computes piece by piece."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.finish()

    def detokenizer(self, prime_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """Incremental detokenisation of one choice. prime_ids: the prompt (its last ids are enough)."""
        return make_detokenizer(self._raw, self._vocabulary, prime_ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; a special token's are those of its name. b"" for ids of no token."""
        return self._vocabulary.bytes[token_id] if 0 <= token_id < self.size else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; parts of characters show as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its name in the vocabulary."""
        found: int | None = self._raw.token_to_id(token)
        return found

    def is_special(self, token_id: int) -> bool:
        return token_id in self._vocabulary.special_ids

    def check_text(self, text: str, param: str) -> None:
        """Raises InvalidRequest, naming `param`, above the byte cap and for lone surrogates."""
        self._check_bytes(len(text), param)  # no character has less than one byte: cheap before the exact count
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
                "text must be valid Unicode",
                param=param,
            ) from None
        self._check_bytes(size, param)

    def close(self) -> None:
        """End the threads; work that waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_bytes(self, size: int, param: str) -> None:
        if size > self.max_prompt_bytes:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_prompt_bytes // BYTES_PER_TOKEN} tokens, "
                f"but {param} has {size} bytes; at most {self.max_prompt_bytes} are tokenised.",
                param=param,
            )

    @staticmethod
    def _encode(tokenizer: RawTokenizer, text: str, add_special_tokens: bool) -> array[int]:
        # Of the library's methods only the batch ones release the GIL, and `fast` skips offsets nobody reads.
        return array("i", tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _check_separation(self, model: Mapping[str, Any]) -> None:
        """A merge rule could still build a special token out of plain text: then the vocabulary is unfit."""
        unknown = model.get("unk_id")  # what the model has no token for may become this one
        if isinstance(model.get("unk_token"), str):
            unknown = self._raw.token_to_id(model["unk_token"])
        for name in self.special_text.names:
            special = self._raw.token_to_id(name)
            if special != unknown and special in self._encode(self._private, name, False):
                raise ModelLoadError(f"tokenizer.json turns the plain text {name!r} into the special token {special}")
