"""How byte-level BPE splits text before it merges, by `tokenizer.ggml.pre`.

GGUF names the rule and llama.cpp holds its regular expressions (`src/llama-vocab.cpp`, which quotes the models' own
where it had to adapt them). Here are the originals, as the models' tokenizer.json have them, with what those do
besides: normalise, and take a word that is a token whole. A rule that is not listed is refused: a guess would give
wrong ids.
"""

from __future__ import annotations

import dataclasses

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)  # Llama 3, after OpenAI's cl100k
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (  # words end where a capital begins
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(end)s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(end)s"
    r"|\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_GPT4O = _O200K % {"end": f"{_CONTRACTIONS}?", "digits": "{1,3}"}
_TEKKEN = _O200K % {"end": "", "digits": ""}
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclasses.dataclass(frozen=True, slots=True)
class Splitting:
    """What happens to a text before its pieces are merged."""

    patterns: tuple[str, ...] = ()  # applied one after the other; none = GPT-2's own
    has_single_digits: bool = False  # each digit a piece, before GPT-2's own pattern
    is_composed: bool = False  # the text is brought into normal form C first
    takes_whole_words: bool = False  # a piece that is a token is not merged from its letters
    adds_bos: bool = False  # where the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.has_single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False) for pattern in self.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_GPT2 = Splitting()
_DIGITS = Splitting(has_single_digits=True)
_NEOX = Splitting(is_composed=True)
_LLAMA = Splitting((_LLAMA3,), takes_whole_words=True, adds_bos=True)
_QWEN = Splitting((_QWEN2,))
_O200 = Splitting((_GPT4O,))

SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": _GPT2,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "command-r": Splitting(has_single_digits=True, is_composed=True),
    "llama-bpe": _LLAMA,
    "llama3": _LLAMA,
    "llama-v3": _LLAMA,
    "falcon3": _LLAMA,
    "pixtral": _LLAMA,
    "dbrx": Splitting((_LLAMA3,)),
    "smaug-bpe": Splitting((_LLAMA3,)),
    "qwen2": Splitting((_QWEN2,), is_composed=True),
    "deepseek-r1-qwen": _QWEN,
    "megrez": _QWEN,
    "qwen35": Splitting((_QWEN35,), is_composed=True),
    "gpt-4o": _O200,
    "llama4": _O200,
    "tekken": Splitting((_TEKKEN,), takes_whole_words=True, adds_bos=True),
    "deepseek-v3": Splitting(_DEEPSEEK3),
    "deepseek-coder": Splitting(_DEEPSEEK_CODER),
}

UNNAMED = "default"
"""What files say, or fail to, that are older than the rules' names."""

UNNAMED_SPLITTINGS: dict[str, Splitting] = {"gpt2": _GPT2, "gptneox": _NEOX}
"""By architecture: where there has only ever been one tokenizer."""
