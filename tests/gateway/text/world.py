"""Small tokenizers of every decoder family, and the default model's files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from models.store import pull
from serving import config
from serving.gateway.text.chat_template import ChatTemplate
from serving.gateway.text.tokenizer import Tokenizer

CORPUS = [
    "the ship and the sea and the other ship, in 1984 and 2001",
    "système naïf, déjà vu; 中文 字符 日本語 👩‍👩‍👧 🙂",
    "def main():\n    return {'a': 1}\n",
] * 10
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MAX_BYTES = 1 << 16

TEXTS = [
    "", " ", "a", "Hello, world!", "  two  spaces  ", "tabs\tand\nnew\r\nlines\n\n\n", "don't we're I'll they've",
    "1234567890 3.14159 1,000,000 ٣٤٥ ²³ ½", "def f(x: int) -> str:\n    return f'{x!r:>{8}}'\n", "x" * 300,
    "中文字符，日本語のテキスト。한국어 텍스트", "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 👍🏽", "é vs e\u0301, Å vs A\u030a, ﬁ ﬂ",
    "عربى עברית ไทย हिन्दी", "z\u0336\u0321a\u0335\u0322l\u0334g\u0337o\u0338", "\x00\x01\x1f\x7f\x80\x9f",
    "\u200b\u200d\ufeff\u2028",
    "\ufffd replacement \ufffd", "<html>&amp;</html>", "a" * 50 + " " * 50 + "1" * 50 + "!" * 50, "𝕬𝖑𝖌𝖊𝖇𝖗𝖆 𓀀𓁐 𠀀",
    "http://a.b/c?d=e&f=g#h", "SELECT * FROM t WHERE a='b';",
    "\N{NO-BREAK SPACE}x\N{EN QUAD}y\N{IDEOGRAPHIC SPACE}z", "'''\"\"\"```",
]  # fmt: skip


def byte_level() -> RawTokenizer:
    """GPT-2's family."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens(["<think>", AddedToken("  ", normalized=False)])
    return raw


def sentencepiece() -> RawTokenizer:
    """Llama 2's family: spaces as ▁, one more in front, unknown characters as bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = RawTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<unk>", *SPECIAL, *bytes_], limit_alphabet=60, show_progress=False
    )
    learnt.train_from_iterator(CORPUS, trainer)
    content = json.loads(learnt.to_str())
    content["added_tokens"] = content["added_tokens"][: 1 + len(SPECIAL)]  # the bytes are ordinary tokens
    raw = RawTokenizer.from_str(json.dumps(content))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def unigram() -> RawTokenizer:
    """A family without a byte table of ours: Unigram with the Metaspace decoder."""
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<s>", show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return raw


FAMILIES = {"byte-level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}


@functools.cache
def family(name: str) -> RawTokenizer:
    return FAMILIES[name]()


def make_tokenizer(raw: RawTokenizer, *, max_prompt_bytes: int = MAX_BYTES, **options: Any) -> Tokenizer:
    return Tokenizer.from_assets(
        {"tokenizer.json": raw.to_str().encode()}, max_prompt_bytes=max_prompt_bytes, **options
    )


def make_template(source: str | None, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, special, tokenizer or make_tokenizer(family("byte-level")))


@functools.cache
def default_model() -> Path:
    """The default model in the store that `argosy serve` uses; pulled when it is not there."""
    settings = config.load()
    return pull(settings.model, store=Path(settings.store))
