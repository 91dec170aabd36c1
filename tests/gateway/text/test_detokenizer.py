"""Incremental detokenisation equals the library's decoding of all ids at once."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as RawTokenizer

from serving.gateway.text.detokenizer import NUM_PRIME_IDS, Detokenizer, push_all
from serving.gateway.text.tokenizer import Tokenizer
from tests.gateway.text.world import FAMILIES, TEXTS, default_model, family, make_tokenizer


def run(detokenizer: Detokenizer, ids: list[int]) -> str:
    return push_all(detokenizer, ids) + detokenizer.finish()


def check_texts(tokenizer: Tokenizer, raw: RawTokenizer) -> None:
    for text in [*TEXTS, "".join(TEXTS)]:
        ids = raw.encode(text, add_special_tokens=False).ids
        assert run(tokenizer.detokenizer(), ids) == raw.decode(ids), text


def check_random_ids(tokenizer: Tokenizer, raw: RawTokenizer, rounds: int) -> None:
    choose = random.Random(3)
    parts = [index for index in range(tokenizer.size) if tokenizer.token_text(index) == "\ufffd"]
    specials = [index for index in range(tokenizer.size) if tokenizer.is_special(index)]
    for turn in range(rounds):
        pool = [range(tokenizer.size), parts, [*parts, *specials, *range(60, 90)]][turn % 3]
        ids = choose.choices(pool, k=choose.randint(1, 24))
        for skip in (True, False):
            found = run(tokenizer.detokenizer(skip_special_tokens=skip), ids)
            assert found == raw.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_of_texts_join_to_the_decoding_of_the_whole(name: str) -> None:
    check_texts(make_tokenizer(family(name)), family(name))


def test_random_ids_of_a_byte_level_vocabulary_do_too() -> None:
    """Broken and interleaved UTF-8 included."""
    check_random_ids(make_tokenizer(family("byte-level")), family("byte-level"), rounds=1500)


@pytest.mark.model
def test_the_default_model_does_too() -> None:
    folder = default_model()
    tokenizer = Tokenizer.from_assets(folder, max_prompt_bytes=1 << 16)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    check_texts(tokenizer, raw)
    check_random_ids(tokenizer, raw, rounds=1500)


@pytest.mark.parametrize("name", FAMILIES)
def test_deltas_are_whole_characters_and_never_change_later(name: str) -> None:
    tokenizer, text = make_tokenizer(family(name)), "naïve 中文 🙂👩‍👩‍👧 end"
    detokenizer = tokenizer.detokenizer()
    deltas = [detokenizer.push(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    if name != "unigram":  # has no token for some of these
        assert all("\ufffd" not in delta for delta in deltas)
        assert "".join(deltas) == text
    for size in range(len(deltas)):
        ids = tokenizer.encode(text, add_special_tokens=False)[:size]
        assert push_all(tokenizer.detokenizer(), ids) == "".join(deltas[:size])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_output_continues_its_prompt(name: str) -> None:
    """Cut anywhere, even within a character: the last ids of the prompt are context enough."""
    tokenizer, text = make_tokenizer(family(name)), "the ship and 12 中文 🙂 " * 6
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    whole = family(name).decode(ids)
    for place in range(len(ids)):
        shown = push_all(tokenizer.detokenizer(), ids[:place])
        rest = run(tokenizer.detokenizer(ids[:place]), ids[place:])
        assert shown + rest == whole
        assert run(tokenizer.detokenizer(ids[max(0, place - NUM_PRIME_IDS) : place]), ids[place:]) == rest


def test_an_incomplete_character_is_shown_only_when_nothing_follows() -> None:
    tokenizer = make_tokenizer(family("byte-level"))
    first, *others = [tokenizer.token_id(character) for character in "ðŁĻĤ"]  # the bytes of 🙂
    assert first is not None
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert [tokenizer.token_bytes(index or 0) for index in (first, *others)] == [b"\xf0", b"\x9f", b"\x99", b"\x82"]


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = make_tokenizer(family("byte-level"))
    ids = tokenizer.encode("<|im_start|>the<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>the<|im_end|>"
    assert [tokenizer.is_special(index) for index in ids] == [True, False, True]


def test_a_run_that_never_becomes_a_character_is_not_held_for_ever() -> None:
    raw = family("unigram")
    tokenizer = make_tokenizer(raw)
    replacement = raw.token_to_id("\ufffd")
    if replacement is None:  # make one: text that looks like a broken character for ever
        raw = RawTokenizer.from_str(raw.to_str())
        raw.add_tokens(["\ufffd"])
        tokenizer, replacement = make_tokenizer(raw), raw.token_to_id("\ufffd")
    assert replacement is not None
    detokenizer = tokenizer.detokenizer()
    shown = "".join(detokenizer.push(replacement) for _ in range(40))
    assert 20 <= len(shown) <= 40
    assert len(shown + detokenizer.finish()) == 40


def test_bytes_of_every_token_join_to_the_text() -> None:
    """What `logprobs.content[].bytes` says."""
    for name in ("byte-level", "sentencepiece"):
        tokenizer, text = make_tokenizer(family(name)), "naïve 中文 🙂"
        data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
        assert data.decode().removeprefix(" ") == text
        assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(tokenizer.size) == b""
