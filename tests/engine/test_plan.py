"""Plans cross process boundaries: what comes out is what went in, and anything else is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serving.engine.plan import NewRow, Plan, decode_plan
from serving.types import SamplingParams


def ints(rng: random.Random, count: int) -> np.ndarray:
    return np.array([rng.randrange(1 << 20) for _ in range(count)], np.int32)


def random_plan(rng: random.Random) -> Plan:
    rows, updates = rng.randint(0, 5), rng.randint(0, 3)
    counts = [rng.randint(0, 4) for _ in range(updates)]
    num_tokens = np.array([rng.randint(1, 9) for _ in range(rows)], np.int32)
    return Plan(
        step=rng.randrange(1 << 31),
        slots=ints(rng, rows),
        num_tokens=num_tokens,
        starts=ints(rng, rows),
        num_samples=ints(rng, rows),
        finished=ints(rng, rng.randint(0, 3)),
        block_updates=np.array([(rng.randrange(9), rng.randrange(9), count) for count in counts], np.int32).reshape(
            -1, 3
        ),
        block_ids=ints(rng, sum(counts)),
        new_rows=tuple(
            NewRow(rng.randrange(9), 1, ints(rng, rng.randint(1, 9)), SamplingParams(seed=rng.getrandbits(64)))
            for _ in range(rng.randint(0, 3))
        ),
        token_ids=ints(rng, int(num_tokens.sum()) if rng.random() < 0.5 else 0),
    )


def assert_equal(got: Plan, wanted: Plan) -> None:
    assert got.step == wanted.step
    arrays = ("slots", "num_tokens", "starts", "num_samples", "finished", "block_updates", "block_ids", "token_ids")
    for name in arrays:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    assert [(row.slot, row.num_prompt, row.tokens.tolist(), repr(row.sampling)) for row in got.new_rows] == [
        (row.slot, row.num_prompt, row.tokens.tolist(), repr(row.sampling)) for row in wanted.new_rows
    ]


@pytest.mark.parametrize("seed", range(50))
def test_a_plan_survives_the_wire(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    words = plan.encode()
    assert words.dtype == np.int32
    assert_equal(decode_plan(np.frombuffer(words.tobytes(), np.int32)), plan)


@pytest.mark.parametrize("seed", range(200))
def test_damaged_words_are_refused_or_are_another_whole_plan(seed: int) -> None:
    """Never an IndexError, a short array or a row without its tokens."""
    rng = random.Random(seed)
    words = random_plan(rng).encode().copy()
    for _ in range(rng.randint(1, 3)):
        words[rng.randrange(len(words))] = rng.choice([-(1 << 31), -1, 0, 1, 7, (1 << 31) - 1, rng.getrandbits(31)])
    if rng.random() < 0.3:
        words = words[: rng.randrange(len(words))]
    try:
        plan = decode_plan(words)
    except ValueError:
        return
    assert_equal(decode_plan(plan.encode()), plan)
    assert len(plan.slots) == len(plan.num_tokens) == len(plan.starts) == len(plan.num_samples)
    assert plan.block_updates[:, 2].sum() == len(plan.block_ids)


def test_new_rows_that_ask_for_more_than_the_payload_are_refused() -> None:
    row = NewRow(0, 1, np.array([5, 6, 7], np.int32), SamplingParams())
    none = np.zeros(0, np.int32)
    words = Plan(1, none, none, none, none, none, none.reshape(-1, 3), none, (row,)).encode()
    words[8 + 2] = 1000
    with pytest.raises(ValueError, match="payload"):
        decode_plan(words)


def test_inputs_are_one_for_each_token_or_none() -> None:
    none, two = np.zeros(0, np.int32), np.array([2], np.int32)
    words = Plan(1, two, two, two, two, none, none.reshape(-1, 3), none, (), np.array([5, 6, 7], np.int32)).encode()
    with pytest.raises(ValueError, match=r"3 inputs for rows of \[2\] tokens"):
        decode_plan(words)


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="announces"):
        decode_plan(np.array([0, -1, 4, 0, 0, 0, 0, 0], np.int32))
