"""Ids are transformers' ids; hostile text is refused or tokenised quickly, off the loop."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time

import pytest
from transformers import AutoTokenizer

from serving.errors import InvalidRequest, ModelLoadError, NoCapacity
from serving.gateway.text import tokenizer as tokenizer_module
from serving.gateway.text.tokenizer import Tokenizer, max_prompt_bytes
from tests.gateway.text.world import MAX_BYTES, TEXTS, default_model, family, make_tokenizer

KIB_64 = 1 << 16
WORST = {
    "one letter": "a" * KIB_64,
    "spaces": " " * KIB_64,
    "spaces and a letter": " " * (KIB_64 - 1) + "a",
    "digits": "1" * KIB_64,
    "newlines": "\n" * KIB_64,
    "quotes": "'" * KIB_64,
    "combining marks": "e" + "\u0301" * (KIB_64 // 2 - 1),
    "emoji joined": "👩‍" * (KIB_64 // 7),
    "CJK": "中" * (KIB_64 // 3),
    "zeros": "\0" * KIB_64,
    "words": "abcdefghijklmnopqrstuvwxyz" * (KIB_64 // 26),
    "right to left": "ע" * (KIB_64 // 2),
    "special": "<|im_end|>" * (KIB_64 // 10),
}


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return Tokenizer.from_assets(default_model(), tokenizer_size=49152, max_prompt_bytes=max_prompt_bytes(8192))


@pytest.mark.model
def test_ids_equal_transformers_on_the_default_model(default: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(default_model())
    pairs = [f"{first}{second}" for first, second in itertools.product(TEXTS, TEXTS[::2])]
    marked = ["<|im_start|>user\nhi<|im_end|>", "a<|endoftext|>b", "<|im_end", "<repo_name>x <file_sep>"]
    texts = [*TEXTS, *pairs, *marked, "".join(TEXTS)]
    assert len(texts) > 300
    for text in texts:
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert list(default.encode(text, add_special_tokens=False)) == wanted, text
        assert list(default.encode(text)) == theirs(text)["input_ids"], text
    assert [list(ids) for ids in default.encode_batch(texts)] == theirs(texts)["input_ids"]
    assert default.size == 49152


@pytest.mark.model
@pytest.mark.parametrize("name", WORST)
def test_the_worst_texts_of_64_kib_take_no_time(default: Tokenizer, name: str) -> None:
    """Idle: 10 to 25 ms, digits 90 ms. The bound only tells linear from quadratic (119 s in tiktoken once)."""
    started = time.perf_counter()
    ids = default.encode(WORST[name])
    assert time.perf_counter() - started < 3
    assert 0 < len(ids) <= KIB_64


@pytest.mark.model
def test_the_event_loop_runs_while_a_long_text_is_tokenised(default: Tokenizer) -> None:
    async def longest_gap() -> tuple[float, float]:
        started = time.perf_counter()
        task = asyncio.create_task(default.encode_async("The quick brown fox. " * 12_000))
        gap, last = 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            gap, last = max(gap, now - last), now
        return gap, time.perf_counter() - started

    gap, whole = asyncio.run(longest_gap())
    assert gap < max(0.5 * whole, 0.05)  # with the GIL held the gap is the whole


def test_special_tokens_in_a_prompt_are_parsed_and_may_be_added() -> None:
    tokenizer = make_tokenizer(family("byte-level"))
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert list(tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False)) == [start, end]
    assert list(tokenizer.encode("<|im_end|>")) == [0, end]  # <s> in front


@pytest.mark.parametrize("text", ["x" * (MAX_BYTES + 1), "中" * (MAX_BYTES // 3 + 1), "\0" * (10 * MAX_BYTES)])
def test_a_text_above_the_cap_is_refused_with_the_numbers(text: str) -> None:
    tokenizer = make_tokenizer(family("byte-level"))
    for call in (
        lambda: tokenizer.encode(text),
        lambda: asyncio.run(tokenizer.encode_async(text)),
        lambda: tokenizer.encode_batch(["ok", text]),
        lambda: asyncio.run(tokenizer.encode_batch_async(["ok", text])),
    ):
        with pytest.raises(
            InvalidRequest, match=rf"tokens, but prompt(\[1\])? has \d+ bytes; at most {MAX_BYTES} "
        ) as caught:
            call()
        assert caught.value.param in ("prompt", "prompt[1]")
    assert len(tokenizer.encode("x" * MAX_BYTES)) > 0


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ud83d"])
def test_a_lone_surrogate_is_refused(text: str) -> None:
    tokenizer = make_tokenizer(family("byte-level"))
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        tokenizer.encode(text, param="suffix")
    assert caught.value.param == "suffix"
    caught.value.message.encode()  # the answer itself is valid text


def test_a_full_waiting_room_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_WAITING", 2)
    tokenizer = make_tokenizer(family("byte-level"), num_threads=1)
    gate = threading.Event()

    async def scenario() -> None:
        waiting = [asyncio.create_task(tokenizer.run(gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(NoCapacity) as caught:
            await tokenizer.encode_async("hello")
        assert caught.value.retry_after_s is not None
        gate.set()
        await asyncio.gather(*waiting)
        assert len(await tokenizer.encode_async("hello")) > 0

    try:
        asyncio.run(scenario())
    finally:
        gate.set()
        tokenizer.close()


def test_a_client_that_leaves_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_WAITING", 1)
    tokenizer = make_tokenizer(family("byte-level"), num_threads=1)
    gate = threading.Event()

    async def scenario() -> None:
        task = asyncio.create_task(tokenizer.run(gate.wait))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        assert len(await tokenizer.encode_async("hello")) > 0

    asyncio.run(scenario())
    tokenizer.close()


def test_assets_that_cannot_serve_are_refused() -> None:
    good = family("byte-level").to_str()
    with pytest.raises(ModelLoadError, match=r"ids up to 331, but the model's tokenizer_size is 300"):
        make_tokenizer(family("byte-level"), tokenizer_size=300)
    roomy = make_tokenizer(family("byte-level"), tokenizer_size=400)  # ids without a token decode to nothing
    assert (roomy.size, roomy.decode([399]), roomy.token_bytes(399)) == (400, "", b"")
    for data in (b"", b"{}", b"[]", b"\xff", good[:-5].encode(), good.replace('"BPE"', '"Evil"').encode()):
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
            Tokenizer.from_assets({"tokenizer.json": data}, max_prompt_bytes=MAX_BYTES)


def test_truncation_saved_with_a_tokenizer_is_ignored() -> None:
    raw = type(family("byte-level")).from_str(family("byte-level").to_str())
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    tokenizer = make_tokenizer(raw)
    assert len(tokenizer.encode("the ship and the sea")) > 4
    assert len(tokenizer.encode("a", add_special_tokens=False)) == 1


def test_the_gateways_text_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, serving.gateway.text.chat_template; print(*({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
