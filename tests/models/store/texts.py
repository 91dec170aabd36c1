"""Strings that tokenizers get wrong."""

from __future__ import annotations

import random
import unicodedata

_CODE = [
    "def f(x: int) -> str:\n\treturn f'{x!r:>10}'\n", "for(int i=0;i<n;++i){a[i]^=0xFFu;}", "<a href=\"b\">&nbsp;</a>",
    "SELECT * FROM t WHERE a<>'b';", "x = {'k': [1, 2.5e-10, None]}  # comment", "\\\\server\\share\\*.txt",
    "#include <a.h>\r\n", "if (a && !b || c != d) { return ~e; }", "lambda *a, **k: (a, k)", "κ=λ.μ(ν)",
    "$HOME/.cache/*.{json,jinja}",
]  # fmt: skip
_WORDS = [
    "the", "Capital", "of", "France", "isn't", "WE'LL", "they've", "I'm", "don’t", "naïve", "Straße",
    "ﬁne", "Ωμέγα", "привет", "こんにちは", "漢字", "中文字符", "한국어", "العربية", "עברית", "ไทยภาษา", "हिन्दी",
    "தமிழ்", "🙂", "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "🇫🇷", "👍🏽", "½", "²",
    "٣", "Ⅷ", "①", "camelCaseWord", "SCREAMING_SNAKE", "kebab-case-word", "v1.2.3-rc4+build",
    "1234567890", "3.14159", "1,000,000", "0xDEADBEEF", "http://a.b/c?d=e&f=%20g", "user@example.com",
    "...", "!!!", "—", "«»", "“quoted”", "A\u030a", "\u212b", "ǆ", "ß", "İ", "ſ", "\u212a",
]  # fmt: skip
_SPACES = [
    " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x0b",
    "\x0c", "\x85",
]  # fmt: skip
_MARKS = ["\u0301", "\u0308", "\u0323", "\u20dd", "\u0489", "\u0e31", "\u093f", "\ufe0f", "\u200d", "\ufeff", "\u202e"]


def varied_texts(count: int, seed: int = 5) -> list[str]:
    """`count` different strings: prose in many scripts, code, numbers, runs, white space, marks, control characters."""
    source = random.Random(seed)
    texts: dict[str, None] = {"": None}
    while len(texts) < count:
        texts[_KINDS[len(texts) % len(_KINDS)](source)] = None
    return list(texts)


def _prose(source: random.Random) -> str:
    return "".join(source.choice(_WORDS) + source.choice(_SPACES) for _ in range(source.randint(1, 25)))


def _code(source: random.Random) -> str:
    return "".join(" " * source.choice([0, 2, 4, 8, 12]) + source.choice(_CODE) for _ in range(source.randint(1, 4)))


def _run(source: random.Random) -> str:
    unit = source.choice([*"aAzé0漢 \n\t-=_.!'\u0301\u200d🙂", "ab", " a", "the ", "12", "\r\n", "\x00"])
    return source.choice(["", "x", " "]) + unit * source.randint(2, 700 // len(unit)) + source.choice(["", "y", " "])


def _numbers(source: random.Random) -> str:
    return source.choice(["", " ", "$", "-"]).join(
        str(source.randrange(10 ** source.randint(1, 15))) for _ in range(source.randint(1, 8))
    )


def _space(source: random.Random) -> str:
    return "".join(source.choice([*_SPACES, *_SPACES, "a", "1", "."]) for _ in range(source.randint(1, 30)))


def _marked(source: random.Random) -> str:
    letters = "aeou nAZ1漢กक🙂'"
    groups = [(source.choice(letters), source.choices(_MARKS, k=source.randint(0, 4))) for _ in range(15)]
    return "".join(letter + "".join(marks) for letter, marks in groups[: source.randint(1, 15)])


def _control(source: random.Random) -> str:
    return "".join(
        chr(source.choice([*range(32), 127, *range(128, 160), 97, 32])) for _ in range(source.randint(1, 30))
    )


def _anything(source: random.Random) -> str:
    """Characters of every kind, but old ones: libraries differ in the newest version of Unicode that they know."""
    ranges = [(0x20, 0x250), (0x370, 0x530), (0x590, 0x2000), (0x2000, 0x2C00), (0x3040, 0x9FA0), (0xAC00, 0xD7A0)]
    chosen = [chr(source.randrange(*source.choice(ranges))) for _ in range(source.randint(1, 60))]
    emoji = [chr(source.randrange(0x1F300, 0x1F640)) for _ in range(source.randint(0, 5))]
    old = [char for char in chosen if unicodedata.ucd_3_2_0.category(char) != "Cn"] + emoji
    source.shuffle(old)
    return "".join(old)


_KINDS = (_prose, _code, _run, _numbers, _space, _marked, _control, _anything)
