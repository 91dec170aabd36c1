"""C3 and C4: a row's bytes depend on the row alone, and a resumed row continues as if nothing had happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serving.engine.sampler import Sampler
from serving.engine.sampling_rows import SamplingRows
from serving.types import SamplingParams
from tests.engine.sampling_world import NO_IDS, Floats, int32, make_sampler, sample
from tests.engine.test_sampler import random_params

SIZE = 5003  # not a multiple of any vector or chunk: alignment and tails differ from row to row
NUM_ROWS = 40


class World:
    """Forty rows with random parameters, and what one step makes of any selection of them."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.params = [random_params(rng, SIZE) for _ in range(NUM_ROWS - 4)]
        self.params += [SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.9)]
        self.params.append(SamplingParams(logprobs=5, top_k=20))
        self.logits: Floats = (rng.standard_normal((NUM_ROWS, SIZE)) * 3).astype(np.float32)
        self.prompt_ids = rng.integers(0, SIZE, 50).astype(np.int32)
        self.output_ids = rng.integers(0, SIZE, 9).astype(np.int32)

    def step(self, selection: list[int]) -> dict[int, tuple[int, bytes | None]]:
        """Row -> (token, packed log-probabilities), sampled together with the others of the selection."""
        sampler = make_sampler(self.params, SIZE, prompt_ids=self.prompt_ids, output_ids=self.output_ids)
        sampled = sample(sampler, self.logits[selection], selection, [9 + row % 5 for row in selection])
        logprobs = sampled.logprobs or {}
        return {row: (int(sampled.ids[at]), logprobs.get(at)) for at, row in enumerate(selection)}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_rows_bytes_do_not_depend_on_the_others(seed: int) -> None:
    world = World(seed)
    together = world.step(list(range(NUM_ROWS)))
    assert sum(logprobs is not None for _, logprobs in together.values()) > 10
    rng = np.random.default_rng(seed)
    for _ in range(15):
        selection = rng.permutation(NUM_ROWS)[: rng.integers(1, NUM_ROWS + 1)].tolist()
        assert world.step(selection) == {row: together[row] for row in selection}
    for row in range(NUM_ROWS):
        assert world.step([row]) == {row: together[row]}


def test_a_rows_bytes_do_not_depend_on_the_number_of_threads() -> None:
    world = World(2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(world.step(list(range(NUM_ROWS))))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_slots_and_scratch_memory_leave_no_trace() -> None:
    """The same row in another slot, after other rows were sampled with the same sampler."""
    world = World(3)
    fresh = world.step([NUM_ROWS - 1, NUM_ROWS - 2])
    rows = SamplingRows(64, SIZE, SIZE, (0,))
    sampler = Sampler(rows)
    for slot in range(8):
        rows.set_row(slot, world.params[slot], world.prompt_ids, world.output_ids)
    for position in range(9, 14):
        sample(sampler, world.logits[:8], range(8), [position] * 8)
    for slot, row in ((63, NUM_ROWS - 1), (0, NUM_ROWS - 2)):  # 0: over a row with other features
        rows.set_row(slot, world.params[row], world.prompt_ids, world.output_ids)
        sampled = sample(sampler, world.logits[[row]], [slot], [9 + row % 5])
        assert (int(sampled.ids[0]), (sampled.logprobs or {}).get(0)) == fresh[row]


RESUMED = [
    SamplingParams(seed=1, frequency_penalty=1.5),
    SamplingParams(seed=2, presence_penalty=1.0, logprobs=2),
    SamplingParams(seed=3, repetition_penalty=1.3, top_p=0.9),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.7, presence_penalty=-0.5),
    SamplingParams(seed=4, min_tokens=10, stop_token_ids=(1, 2), temperature=0.3, logprobs=0),
    SamplingParams(seed=5, frequency_penalty=-2.0, logit_bias=((3, 2.0),), top_k=5),
    SamplingParams(seed=6),
]


@pytest.mark.parametrize("params", RESUMED)
def test_resuming_at_every_position_gives_the_same_tokens(params: SamplingParams) -> None:
    """Counts built by appending equal counts built by set_row from the same output ids (C2)."""
    size = 12
    rng = np.random.default_rng(8)
    logits: Floats = (rng.standard_normal((60, size)) * 1.5).astype(np.float32)
    prompt_ids = rng.integers(0, size, 5).astype(np.int32)

    def run(output_ids: list[int], sampler: Sampler) -> list[tuple[int, bytes]]:
        steps = []
        for position in range(len(output_ids), len(logits)):
            sampled = sample(sampler, logits[[position]], [0], [position])
            steps.append((int(sampled.ids[0]), (sampled.logprobs or {}).get(0, b"")))
        return steps

    whole = run([], make_sampler([params], size, prompt_ids=prompt_ids))
    tokens = [token for token, _ in whole]
    for position in (0, 1, 2, 9, 10, 11, 30, 59):
        resumed = make_sampler([params], size, prompt_ids=prompt_ids, output_ids=int32(*tokens[:position]))
        assert run(tokens[:position], resumed) == whole[position:]


def test_penalties_of_a_long_output_grow_with_it() -> None:
    """More distinct tokens than the counts' first allocation: each sampled once is never the best again."""
    size = 1000
    sampler = make_sampler([SamplingParams(temperature=0.0, presence_penalty=2.0)], size)
    logits: Floats = np.linspace(1, 0, size, dtype=np.float32)[None]
    tokens = [int(sample(sampler, logits, [0], [position]).ids[0]) for position in range(size)]
    assert tokens == list(range(size))


def test_a_cleared_slot_is_plain_greedy_again() -> None:
    rows = SamplingRows(2, 4, 4, (0,))
    sampler = Sampler(rows)
    rows.set_row(1, SamplingParams(frequency_penalty=2.0, logprobs=3, seed=5), NO_IDS, int32(3, 3, 3))
    rows.clear_row(1)
    rows.clear_row(1)
    sampled = sample(sampler, np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), [1], [3])
    assert sampled.ids.tolist() == [3]
    assert sampled.logprobs is None
    assert not rows.edits


def test_a_slots_new_row_drops_the_counts_of_the_old_one() -> None:
    rows = SamplingRows(1, 4, 4, (0,))
    rows.set_row(0, SamplingParams(frequency_penalty=2.0), NO_IDS, int32(3, 3, 3))
    rows.set_row(0, SamplingParams(), NO_IDS, NO_IDS)
    assert not rows.edits


def test_counts_follow_the_slot_not_the_place_in_the_batch() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler = make_sampler([params, params], 4)
    logits: Floats = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    for slot, expected in ((0, 0), (1, 0), (0, 1), (0, 0)):
        assert sample(sampler, logits, [slot], [0]).ids.tolist() == [expected]
    both = sample(sampler, np.repeat(logits, 2, 0), [1, 0], [1, 3])
    assert both.ids.tolist() == [1, 0]
