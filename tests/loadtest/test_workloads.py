"""Workloads: exact lengths, and the same seed makes the same bytes, whoever makes them."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.arrivals import Arrival
from loadtest.call import Call
from loadtest.lengths import Length
from loadtest.plan import Plan, Words, WorkloadPlan
from loadtest.spec import SpecError
from loadtest.workloads import SAMPLINGS, Workload

WORDS = Words(opener="Go", units=(" a", " b", " c"), overhead={"chat": 4}, turn_overhead=8, is_exact=True)


def workload(seed: int = 0, keys_file: str | None = None, verify: float = 0.0, **spec: Any) -> Workload:
    return Workload(
        Plan(
            target="http://x", model="m", seed=seed, workload=WorkloadPlan(**spec), words=WORDS,
            keys_file=keys_file, verify_share=verify,
        )
    )  # fmt: skip


def first(made: Workload, num: int, arrival: Arrival | None = None) -> list[Call]:
    calls = [made.conversation(index, arrival).next() for index in range(num)]
    return [call for call in calls if call is not None]


def bodies(calls: list[Call]) -> list[dict[str, Any]]:
    return [json.loads(call.body) for call in calls]


def test_prompts_of_ids_are_as_long_as_they_are_meant_to_be() -> None:
    calls = first(workload(prompt="uniform:min=3,max=9", output="5"), 50)
    for call, body in zip(calls, bodies(calls), strict=True):
        assert len(body["prompt"]) == call.wanted_prompt_tokens
        assert body["max_tokens"] == call.wanted_output_tokens == 5 and body["ignore_eos"]
        assert all(32 <= token < 256 for token in body["prompt"])
    assert {call.wanted_prompt_tokens for call in calls} == set(range(3, 10))


def test_log_normal_lengths_have_the_median_asked_for_and_keep_their_bounds() -> None:
    length = Length("lognormal:median=256,sigma=0.8,min=16,max=2048", "x")
    drawn = [length.draw(random.Random(seed)) for seed in range(3000)]
    assert statistics.median(drawn) == pytest.approx(256, rel=0.06)
    assert min(drawn) >= 16 and max(drawn) <= 2048


def test_chats_count_the_template_and_every_turn_before() -> None:
    conversation = workload(endpoint="chat", prompt="10", output="6", turns=3).conversation(0)
    for turn, wanted in enumerate([10, 10 + 8 + 9 + 5, 10 + 2 * (8 + 9 + 5)]):
        call = conversation.next("a reply")
        assert call is not None
        assert (call.turn, call.wanted_prompt_tokens, call.session) == (turn, wanted, 0)
        messages = json.loads(call.body)["messages"]
        units = sum(len(message["content"].split()) - 1 for message in messages)
        assert 4 + 8 * turn + units == wanted
    assert conversation.next() is None


def test_later_turns_can_quote_the_server() -> None:
    conversation = workload(endpoint="chat", turns=2, replies="server").conversation(0)
    conversation.next()
    call = conversation.next("what it said")
    assert call is not None and call.wanted_prompt_tokens is None
    assert json.loads(call.body)["messages"][1] == {"role": "assistant", "content": "what it said"}


def test_a_turn_of_ids_begins_with_all_that_was_before() -> None:
    conversation = workload(prompt="4", output="3", turns=2).conversation(0)
    one, two = conversation.next(), conversation.next()
    assert one is not None and two is not None
    prompts = [json.loads(call.body)["prompt"] for call in (one, two)]
    assert prompts[1][:4] == prompts[0] and len(prompts[1]) == 4 + 3 + 4


def test_the_share_of_prompts_asked_for_begins_with_a_shared_prefix() -> None:
    made = workload(prompt="20", prefix_tokens=12, prefix_hit=0.6, num_prefixes=3)
    prompts = [tuple(body["prompt"]) for body in bodies(first(made, 600))]
    starts = [prompt[:12] for prompt in prompts]
    shared = {start for start in starts if starts.count(start) > 1}
    assert len(shared) == 3
    assert sum(start in shared for start in starts) / 600 == pytest.approx(0.6, abs=0.06)
    assert len(set(prompts)) == 600, "each has an end of its own"


def test_intruders_are_long_rare_and_labelled() -> None:
    calls = first(workload(prompt="10", intruder_share=0.1, intruder_tokens=500), 500)
    lengths = {(call.label, call.wanted_prompt_tokens) for call in calls}
    assert lengths == {("", 10), ("intruder", 500)}
    assert sum(call.label == "intruder" for call in calls) == pytest.approx(50, abs=20)


def test_tenants_share_by_weight_and_keys_stay_out_of_bodies(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# name key weight\nsmall sk-1\nlarge sk-2 3\n")
    made = workload(keys_file=str(keys))
    calls = first(made, 400)
    assert sum(call.tenant == "large" for call in calls) == pytest.approx(300, abs=40)
    assert not any(b"sk-" in call.body for call in calls)
    assert made.tenants.by_name["large"].headers == {"Authorization": "Bearer sk-2"}


def test_mixed_sampling_uses_every_kind_and_fixes_every_seed() -> None:
    found = bodies(first(workload(sampling="mixed"), 100))
    assert all(any(one.items() <= body.items() for body in found) for one in SAMPLINGS)
    assert len({body["seed"] for body in found}) == 100


def test_a_trace_prescribes_lengths() -> None:
    (call,) = first(workload(), 1, Arrival(0.0, 17, 4))
    assert (call.wanted_prompt_tokens, call.wanted_output_tokens) == (17, 4)


def test_data_sets_are_used_whole_before_any_line_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": f"{n}", "output_tokens": n + 1} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, [*lines, {"messages": [{"role": "user", "content": "hi"}]}])))
    calls = first(workload(data=str(path)), 20)
    texts = [body.get("prompt", "chat") for body in bodies(calls)]
    assert set(texts[:10]) == set(texts[10:]) == {*map(str, range(9)), "chat"}
    assert texts[:10] != texts[10:]
    assert {call.endpoint for call in calls} == {"completions", "chat"}


def test_the_seed_fixes_every_byte() -> None:
    spec: dict[str, Any] = {
        "endpoint": "mixed", "prompt": "uniform:min=5,max=50", "sampling": "mixed", "stream_share": 0.5,
        "intruder_share": 0.1, "prefix_tokens": 4, "prefix_hit": 0.5,
    }  # fmt: skip
    one, same, other = workload(1, **spec), workload(1, **spec), workload(2, **spec)
    backwards = [same.conversation(index).next() for index in reversed(range(60))][::-1]
    hashes = [call.hash for call in first(one, 60)]
    assert hashes == [call.hash for call in backwards if call is not None]
    assert not set(hashes) & {call.hash for call in first(other, 60)}


def test_fields_can_be_added_and_taken_away_but_a_request_stays_one_choice() -> None:
    (body,) = bodies(first(workload(extra_body={"top_k": 5, "ignore_eos": None}), 1))
    assert body["top_k"] == 5 and "ignore_eos" not in body
    with pytest.raises(SpecError, match="n and best_of stay 1"):
        workload(extra_body={"n": 2})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"prompt": "0"}, "--prompt-tokens: tokens must be above 0, got 0"),
        ({"output": "normal:3"}, "--output-tokens: 'normal' is none of fixed, lognormal, uniform"),
        ({"prompt": "uniform:min=5,max=2"}, "1 ≤ min ≤ max"),
        ({"turns": 2, "prompt_format": "text"}, "--turns"),
        ({"replies": "server"}, "--replies server is for --endpoint chat"),
        ({"token_ids": (9, 9)}, "--token-ids: 0 ≤ low < high, got 9:9"),
        ({"data": "/nowhere"}, "--data: .*nowhere"),
    ],
)
def test_what_cannot_be_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        workload(**spec)


def test_a_plan_travels_whole() -> None:
    plan = workload(3, endpoint="chat", prompt="9").plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
