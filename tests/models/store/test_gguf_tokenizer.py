"""Tokenizers out of GGUF metadata give the ids that their definitions give."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from models.store import ALIASES, StoreError
from models.store.gguf_file import GgufFile, read_gguf
from models.store.gguf_splitting import SPLITTINGS
from models.store.gguf_tokenizer import tokenizer_files
from tests.models.store.oracles import ByteLevelBpe, byte_alphabet, sentencepiece_bpe, split_by
from tests.models.store.texts import varied_texts

# White space as Unicode has it, which Python's \s is not: it also has the separators U+001C to U+001F.
S = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
NOT_S = S.replace("[", "[^", 1)
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^{S[1:-1]}\p{{L}}\p{{N}}]+|{S}+(?!{NOT_S})|{S}+"
TEXTS = varied_texts(1000)

CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6


@pytest.mark.model
def test_the_default_models_ids_are_those_of_two_other_implementations() -> None:
    path = ALIASES["smollm2-135m-instruct"].locate()
    file = read_gguf(path)
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])

    tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    added = {token: index for token, index in ids.items() if types[index] in (CONTROL, USER_DEFINED)}
    plain = ByteLevelBpe(tokens, file.metadata["tokenizer.ggml.merges"], added, split_by(r"\p{N}", GPT2))
    theirs: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    theirs = theirs.backend_tokenizer
    # transformers does not know this file's splitting rule; as llama.cpp has it:
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])

    assert len(set(TEXTS)) == 1000
    texts = [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|><|endoftext|>", "<|im_end", "<repo_name>x"]
    found = [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=False)]
    assert found == [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    assert found == [plain.encode(text) for text in texts]
    known = {byte for byte, char in byte_alphabet().items() if char in ids}
    whole = [set(text.encode()) <= known for text in texts]
    assert whole.count(False) < 150  # of the control characters some have no token
    for text, back, is_whole in zip(texts, ours.decode_batch(found, skip_special_tokens=False), whole, strict=True):
        assert not is_whole or back == text
    assert len({index for row in found for index in row}) > 500  # not bytes alone


ORIGINALS = {
    # As llama.cpp has them, which writes contractions and classes out in its own way.
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "starcoder": (r"\p{N}", GPT2),
    "llama-bpe": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        rf"| ?[^{S[1:-1]}\p{{L}}\p{{N}}]+[\r\n]*|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+",
    ),
    "qwen2": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        rf"| ?[^{S[1:-1]}\p{{L}}\p{{N}}]+[\r\n]*|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+",
    ),
    "qwen35": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        rf"| ?[^{S[1:-1]}\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+",
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        rf"| ?[^{S[1:-1]}\p{{L}}\p{{N}}]+[\r\n/]*|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+",
    ),
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        rf"|\p{{N}}{{1,3}}| ?[^{S[1:-1]}\p{{L}}\p{{N}}]+[\r\n/]*|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]\^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        rf"|{S}*[\r\n]+|{S}+(?!{NOT_S})|{S}+",
    ),
    "deepseek-coder": (
        r"[\r\n]",
        rf"{S}?\p{{L}}+",
        rf"{S}?\p{{P}}+",
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
        GPT2[:0] or r"(?!)",
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_splitting_rule_cuts_where_its_original_does(name: str) -> None:
    split = split_by(*ORIGINALS[name])
    rule = SPLITTINGS[name].pre_tokenizer()
    alphabet = byte_alphabet()
    for text in TEXTS:
        if text:
            found = [piece for piece, _ in rule.pre_tokenize_str(text)]
            assert found == ["".join(alphabet[byte] for byte in piece.encode()) for piece in split(text)], text


def small_bpe(pre: str, path: Path, **metadata: Any) -> GgufFile:
    """A byte-level vocabulary of 600 tokens that was trained with the splitting rule, as a GGUF file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITTINGS[pre].pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[1:400], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    extra = [("<bos>", CONTROL), ("<think>", USER_DEFINED), ("[PAD602]", UNUSED), ("[PAD603]", UNUSED)]
    pairs = {
        "general.architecture": "llama", "llama.context_length": 64, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens + [token for token, _ in extra],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [kind for _, kind in extra],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens), **metadata,
    }  # fmt: skip
    return GgufFile(path, {key: value for key, value in pairs.items() if value is not None}, {})


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "deepseek-v3", "olmo"])
def test_a_rule_with_its_vocabulary_gives_the_ids_of_the_definition(tmp_path: Path, pre: str) -> None:
    file = small_bpe(pre, tmp_path)
    tokens = file.metadata["tokenizer.ggml.tokens"]
    added = {"<bos>": tokens.index("<bos>"), "<think>": tokens.index("<think>")}
    composed, whole = pre in ("qwen2", "olmo"), pre in ("llama-bpe", "tekken")
    split = split_by(*ORIGINALS.get(pre, ORIGINALS["gpt-2"]))
    plain = ByteLevelBpe(tokens, file.metadata["tokenizer.ggml.merges"], added, split, takes_whole=whole)
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
    for text in [*TEXTS[::3], "a<think>b <bos>c"]:
        wanted = unicodedata.normalize("NFC", text) if composed else text
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == plain.encode(wanted), text
        assert ours.decode(ids, skip_special_tokens=False) == wanted


@pytest.mark.parametrize(("architecture", "is_composed"), [("gpt2", False), ("gptneox", True), ("llama", None)])
def test_a_file_that_names_no_rule_is_split_where_there_is_but_one(
    tmp_path: Path, architecture: str, is_composed: bool | None
) -> None:
    file = small_bpe("gpt-2", tmp_path)
    file.metadata.update({"general.architecture": architecture, f"{architecture}.context_length": 64})
    del file.metadata["tokenizer.ggml.pre"]
    if is_composed is None:
        with pytest.raises(
            StoreError, match=r"splitting rule 'default' .* \(gpt-2, mpt, .*\); pull the model's Hugging"
        ):
            tokenizer_files(file)
        return
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
    assert ours.decode(ours.encode("A\u030a 12").ids) == ("\u00c5 12" if is_composed else "A\u030a 12")


def test_rows_that_are_padding_are_no_tokens(tmp_path: Path) -> None:
    ours = Tokenizer.from_str(tokenizer_files(small_bpe("qwen2", tmp_path))["tokenizer.json"])
    assert ours.get_vocab_size() == 602
    assert ours.token_to_id("[PAD602]") is None


@pytest.mark.parametrize(
    ("pre", "flags", "wanted"),
    [
        ("qwen2", {}, ["x"]),
        ("llama-bpe", {}, ["<bos>", "x"]),  # which never says so
        ("llama-bpe", {"bos": False}, ["x"]),
        ("qwen2", {"bos": True, "eos": True}, ["<bos>", "x", "<bos>"]),
        ("qwen2", {"eos": True}, ["x", "<bos>"]),
    ],
)
def test_what_is_put_around_a_text(tmp_path: Path, pre: str, flags: dict[str, bool], wanted: list[str]) -> None:
    pairs = {f"tokenizer.ggml.add_{name}_token": value for name, value in flags.items()}
    file = small_bpe(pre, tmp_path, **pairs, **{"tokenizer.ggml.eos_token_id": 600})
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
    assert ours.encode("x").tokens == wanted
    assert ours.encode("x", add_special_tokens=False).tokens == ["x"]


def test_markup_that_a_converter_left_normal_is_markup(tmp_path: Path) -> None:
    file = small_bpe("qwen2", tmp_path)
    file.metadata["tokenizer.ggml.token_type"][600] = 1
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
    assert ours.encode("a<bos>").ids[-1] == 600
    assert ours.decode([600]) == ""


def small_sentencepiece(path: Path, *, architecture: str = "llama", **metadata: Any) -> GgufFile:
    """A SentencePiece vocabulary with byte tokens, characters and 400 trained pieces."""
    tokenizer = Tokenizer(models.BPE())
    corpus = ["▁" + text.replace(" ", "▁") for text in TEXTS[1:500:2] if "▁" not in text]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1100, show_progress=False))
    vocab = tokenizer.get_vocab()
    learnt = [token for token in sorted(vocab, key=vocab.__getitem__) if token.isprintable()]
    first = [("<unk>", 2), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{byte:02X}>", BYTE) for byte in range(256))]
    runs = [(" " * width, USER_DEFINED) for width in range(2, 9)] if architecture == "gemma3" else []
    learnt = [token for token in learnt if len(token) < 2 or token.strip("▁")] if runs else learnt
    extra = [("<tool>", USER_DEFINED)]
    pairs = {
        "general.architecture": architecture, f"{architecture}.context_length": 64, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*(token for token, _ in [*first, *runs]), *learnt, *(token for token, _ in extra)],
        "tokenizer.ggml.token_type": [*(kind for _, kind in [*first, *runs]), *[1] * len(learnt), USER_DEFINED],
        "tokenizer.ggml.scores": [
            *[0.0] * len(first), *[-1000.0] * len(runs), *(-float(rank) for rank in range(len(learnt))), -1000.0,
        ],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        **metadata,
    }  # fmt: skip
    return GgufFile(path, {key: value for key, value in pairs.items() if value is not None}, {})


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece_gives_the_ids_of_the_definition(tmp_path: Path, has_prefix: bool) -> None:
    file = small_sentencepiece(tmp_path, **{"tokenizer.ggml.add_space_prefix": has_prefix})
    tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    scores = file.metadata["tokenizer.ggml.scores"]
    pieces = {token: (index, scores[index]) for index, token in enumerate(tokens) if types[index] == 1}
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
    mark, num_bytes = tokens.index("<tool>"), 0
    for text in TEXTS[::2]:
        if "▁" in text:
            continue
        escaped = ("▁" if has_prefix and text else "") + text.replace(" ", "▁")
        wanted = sentencepiece_bpe(escaped, pieces, list(range(3, 259)))
        num_bytes += sum(index < 259 for index in wanted)
        assert ours.encode(text, add_special_tokens=False).ids == wanted, text
        assert ours.decode(wanted, skip_special_tokens=False) == text
        # What follows markup begins anew.
        assert ours.encode(f"<tool>{text}", add_special_tokens=False).ids == [mark, *wanted]
    assert num_bytes > 1000
    assert ours.encode("a").ids[0] == 1  # unless the file says otherwise


def test_gemmas_tokenizer_is_that_of_transformers(tmp_path: Path) -> None:
    file = small_sentencepiece(tmp_path, architecture="gemma3", **{"tokenizer.ggml.add_space_prefix": False})
    ours = Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
    theirs: Any = AutoTokenizer.from_pretrained(
        write_metadata(tmp_path / "m.gguf", file).parent, gguf_file="m.gguf", local_files_only=True
    )
    for text in TEXTS:
        ids = theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        if "▁" not in text:
            assert ours.decode(ids) == text
    assert ours.encode("    a", add_special_tokens=False).tokens[0].startswith("▁▁")


def write_metadata(path: Path, file: GgufFile) -> Path:
    writer = gguf.GGUFWriter(path, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str() if key != "general.architecture":
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def change(key: str, place: int, value: Any) -> Any:
    def apply(metadata: dict[str, Any]) -> None:
        metadata[f"tokenizer.ggml.{key}"][place] = value

    return apply


def drop(key: str) -> Any:
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{key}")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop("scores"), "'tokenizer.ggml.scores' is missing"),
        (lambda metadata: metadata["tokenizer.ggml.scores"].pop(), r"\d+ tokens but \d+ scores"),
        (change("scores", 300, float("nan")), "the score of '.*' is nan"),
        (change("tokens", 20, "<0xZZ>"), "1 of the 256 byte tokens are missing"),
        (change("tokens", 300, "x" * 1000), "a token of 1000 characters; at most 512"),
        (change("tokens", 300, "<s>"), "1 duplicate tokens"),
        (change("tokens", 300, 7), "not a list of strings"),
        (drop("token_type"), "'tokenizer.ggml.token_type' is missing"),
        (drop("bos_token_id"), "add_bos_token is set but there is no bos_token_id"),
    ],
)
def test_a_sentencepiece_vocabulary_that_cannot_be_is_refused(tmp_path: Path, harm: Any, message: str) -> None:
    file = small_sentencepiece(tmp_path)
    harm(file.metadata)
    with pytest.raises(StoreError, match=message):
        tokenizer_files(file)


def test_random_damage_of_the_metadata_is_refused_or_harmless(tmp_path: Path) -> None:
    source = random.Random(3)
    values: list[Any] = [None, -1, 10**9, "", "x", [], [1], ["a"], ["a", "a"], True, 0.5, float("nan")]
    num_refused = 0
    for _ in range(120):
        file = small_bpe("qwen2", tmp_path) if source.random() < 0.1 else GgufFile(tmp_path, dict(BPE.metadata), {})
        key = source.choice(list(file.metadata))
        file.metadata[key] = source.choice(values)
        try:
            Tokenizer.from_str(tokenizer_files(file)["tokenizer.json"])
        except StoreError:
            num_refused += 1
    assert num_refused > 50


BPE = small_bpe("qwen2", Path("m.gguf"))
