"""The account of a choice's life: what is told, what is added up, and that it stays small."""

from __future__ import annotations

import random

from serving.gateway.account import account
from serving.gateway.choice_life import MAX_CHUNKS, MAX_EVENTS, ChoiceLife, Event
from serving.gateway.chrome import chrome_trace
from serving.gateway.life import Life
from serving.gateway.steps import SeenStep, StepLog
from serving.types import Wait
from tests.gateway.test_steps import record, seen


class Replica:
    """Steps one after the other, their frames read at once."""

    def __init__(self) -> None:
        self.log = StepLog()
        self.now = 0.0
        self._number = 0

    def step(self, duration_s: float, num_prefill_tokens: int = 0) -> SeenStep:
        told = record(self.now, duration_s, num_prefill_tokens=num_prefill_tokens)
        self.now += duration_s
        self._number += 1
        return self.log.add(self._number, told, self.now)

    def token(self, life: ChoiceLife, duration_s: float = 0.01, num_prefill_tokens: int = 0) -> None:
        self.step(duration_s, num_prefill_tokens)
        life.grew(self.now, life.num_tokens + 1, self.log)


def kinds(life: ChoiceLife) -> list[str]:
    return [event.kind for event in life.events]


def test_the_life_of_a_plain_choice() -> None:
    life, replica = ChoiceLife(), Replica()
    life.queued(0.0, "no_permit", 3, 700)
    assert life.state == "queued" and [event.kind for event in life.present(0.5)] == ["queued"]
    life.sent(1.0, "replica-0", 0)
    replica.now = 1.2
    step = replica.step(0.3)
    life.noted(1, 40, step)
    life.admitted(step.started_at, 16)
    life.grew(replica.now, 1, replica.log)
    for _ in range(9):
        replica.token(life)
    assert life.state == "decode"
    life.finish(replica.now, "stop", life.num_tokens)
    assert kinds(life) == ["queued", "sent", "chunk", "admitted", "decode", "finished"]
    queued, _, chunk, admitted, decode, _ = life.events
    assert (queued.seconds, queued.detail) == (1.0, {"why": "no_permit", "position": 3, "tokens_ahead": 700})
    assert (chunk.at, round(chunk.seconds, 6), chunk.detail["tokens"]) == (1.2, 0.3, 40)
    assert admitted.at == chunk.at
    assert decode.detail == {"tokens": 10, "first_step": 1, "last_step": 10}
    assert round(decode.seconds, 6) == 0.09


def test_a_wait_that_took_no_time_is_none() -> None:
    life = ChoiceLife()
    life.queued(5.0, "no_permit", 1, 0)
    life.sent(5.0002, "replica-0", 0)
    assert kinds(life) == ["sent"]


def test_a_long_gap_has_a_cause_and_ordinary_unevenness_has_none() -> None:
    life, replica, draw = ChoiceLife(), Replica(), random.Random(3)
    for _ in range(200):
        replica.token(life, draw.uniform(0.01, 0.025))
    assert life.num_gaps == 0
    replica.token(life, 0.4, num_prefill_tokens=256)
    replica.token(life)
    assert life.num_gaps == 1
    assert life.longest_gap is not None and life.longest_gap.cause == "prefill"
    assert kinds(life) == ["decode", "gap"]
    assert [event.detail["tokens"] for event in [life.events[0], *life.present(replica.now)]] == [200, 2]


def test_a_slow_machine_is_no_row_of_gaps() -> None:
    life, replica = ChoiceLife(), Replica()
    for _ in range(50):
        replica.token(life, 0.25)
    assert life.num_gaps == 0, "an even pace is no gap, however slow, up to a second"
    replica.token(life, 1.5)
    assert life.num_gaps == 1


def test_gaps_of_one_cause_with_a_token_between_them_are_one_event() -> None:
    life, replica = ChoiceLife(), Replica()
    for _ in range(20):
        replica.token(life)
    for at in range(30):
        replica.token(life, 0.2 + (at == 17) * 0.1, num_prefill_tokens=255)
    for _ in range(20):
        replica.token(life)
    life.finish(replica.now, "length", life.num_tokens)
    assert kinds(life) == ["decode", "gap", "decode", "finished"]
    gap = life.events[1]
    assert gap.detail["gaps"] == life.num_gaps == 30
    assert round(float(gap.detail["longest_s"]), 6) == 0.3
    assert "step 38" in str(gap.detail["detail"]), "the longest one's words"
    assert round(gap.seconds, 6) == 6.1
    tokens = sum(int(event.detail["tokens"]) for event in life.events if event.kind == "decode")
    assert tokens + 29 == life.num_tokens == 70, "all but those between the gaps"


def test_what_interrupted_a_choice_is_the_cause_of_its_gap() -> None:
    life, replica = ChoiceLife(), Replica()
    life.sent(0.0, "replica-0", 0)
    for _ in range(5):
        replica.token(life)
    life.preempted(replica.now, 37)
    assert life.state == "prefill"
    replica.now += 0.6
    step = replica.step(0.1)
    life.noted(3, Wait.BLOCKS, step)
    life.noted(1, 38, step)
    life.grew(replica.now, 6, replica.log)
    waited = next(event for event in life.events if event.kind == "waited")
    assert (waited.detail["why"], round(waited.seconds, 6)) == ("blocks", 0.6)
    assert life.longest_gap is not None and life.longest_gap.cause == "preempted"

    life.lost(replica.now + 0.2, "replica-0", "stalled")
    life.queued(replica.now + 0.2, "no_replica", 1, 0)
    life.sent(replica.now + 1.2, "replica-1", 6)
    other = Replica()
    other.now = replica.now + 1.3
    other.step(0.1)
    life.grew(other.now, 7, other.log)
    gap = [event for event in life.events if event.kind == "gap"][-1]
    assert gap.detail == {"cause": "resumed", "detail": "replica-0 was stalled; resumed on replica-1"}
    assert round(gap.seconds, 6) == 1.4
    assert (life.num_preemptions, life.num_resumes, life.num_gaps) == (1, 1, 2)


def test_chunks_beyond_a_bound_are_added_up() -> None:
    life, replica = ChoiceLife(), Replica()
    for _ in range(MAX_CHUNKS + 100):
        life.noted(1, 256, replica.step(0.1))
    assert len(life.events) == MAX_CHUNKS
    assert sum(int(event.detail["tokens"]) for event in life.events) == 256 * (MAX_CHUNKS + 100)
    assert life.events[-1].detail["steps"] == 101


def test_a_life_stays_small_and_in_order_whatever_happens() -> None:
    for seed in range(20):
        draw, life, replica = random.Random(seed), ChoiceLife(), Replica()
        for _ in range(2000):
            match draw.randrange(8):
                case 0:
                    life.queued(replica.now, "no_permit", 1, 5)
                    replica.now += draw.random()
                    life.sent(replica.now, "replica-0", life.num_tokens)
                case 1:
                    life.noted(1, 100, replica.step(0.2))
                case 2:
                    life.noted(2, 100, replica.step(0.01))
                case 3:
                    life.noted(draw.choice((3, 9)), draw.choice((1, 4, 77)), replica.step(0.01))
                case 4:
                    life.lost(replica.now, "replica-0", "lost")
                case _:
                    replica.token(life, draw.choice((0.01, 0.01, 0.5)))
        life.end(replica.now, "cancelled", {})
        life.finish(replica.now, "stop", life.num_tokens)
        assert len(life.events) == MAX_EVENTS and life.num_events_left_out > 0
        assert life.events[-1].kind == life.state == "cancelled", "the first end counts, and is always told"
        assert all(event.at <= event.until <= replica.now for event in life.events)


def a_life() -> Life:
    life = Life("req-1", "/v1/completions", arrived=10.0, arrived_wall=1_700_000_000.0)
    life.did("read", 10.0, 10.002)
    life.did("tokenised", 10.002, 10.003, tokens=5)
    life.id, life.model, life.num_prompt_tokens = "cmpl-1", "tiny", 5
    choice = ChoiceLife()
    life.choices = [choice]
    choice.queued(10.003, "no_permit", 2, 9)
    choice.sent(10.103, "replica-0", 0)
    choice.events.append(Event("chunk", 10.11, 10.12, {"step": 1, "tokens": 5, "rows": 1, "announced_s": 0.01}))
    log = StepLog()
    choice.grew(10.12, 1, log)
    choice.grew(10.14, 2, log)
    return life


def test_the_account_tells_where_the_time_went() -> None:
    life = a_life()
    now = account(life, 10.2)
    assert (now["state"], now["elapsed_s"]) == ("decode", 0.2)
    assert now["choices"][0]["events"][-1] == {
        "kind": "decode", "at_s": 0.12, "for_s": 0.02, "tokens": 2, "first_step": -1, "last_step": -1,
    }  # fmt: skip
    life.choices[0].finish(10.15, "stop", life.choices[0].num_tokens)
    life.end(10.16, None, has_left=False)
    found = account(life, 99.0)
    assert (found["state"], found["elapsed_s"], found["error"]) == ("finished", 0.16, None)
    assert found["summary"] == {
        "read_s": 0.002, "tokenise_s": 0.001, "queue_s": 0.1, "prefill_s": 0.017, "decode_s": 0.02,
        "time_to_first_token_s": 0.12, "num_gaps": 0, "num_preemptions": 0, "num_resumes": 0,
    }  # fmt: skip
    assert [event["kind"] for event in found["events"]] == ["received", "read", "tokenised"]


def test_the_trace_has_a_lane_for_the_request_and_one_per_choice() -> None:
    life = a_life()
    life.end(10.2, None, has_left=True)
    trace = chrome_trace(account(life, 11.0))
    lanes = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert lanes == {0: "request", 1: "choice 0"}
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert spans["cancelled"]["dur"] == 200_000.0
    assert spans["queued: no_permit"]["dur"] == 100_000.0 and spans["queued: no_permit"]["tid"] == 1
    assert all(event["ts"] >= 0 for event in trace["traceEvents"] if event["ph"] != "M")


def test_the_longest_gap_of_a_seen_step_survives_in_the_summary() -> None:
    life = a_life()
    log = StepLog()
    log.add(5, seen(5, 10.14, 11.0, num_prefill_tokens=100).record, 11.0)
    life.choices[0].grew(11.0, 3, log)
    found = account(life, 11.0)
    assert (
        found["longest_gap_cause"] == "prefill" and found["longest_gap_s"] == found["summary"]["longest_gap_s"] == 0.86
    )


def test_cached_tokens_are_those_of_the_first_admission_as_in_usage() -> None:
    life = a_life()
    (choice,) = life.choices = [ChoiceLife()]
    choice.sent(10.1, "replica-0", 0)
    choice.admitted(10.11, 0)
    choice.lost(10.2, "replica-0", "lost")  # before its first token
    choice.sent(10.3, "replica-1", 0)
    choice.admitted(10.31, 48)
    assert life.cached_tokens == account(life, 10.4)["cached_tokens"] == 0
