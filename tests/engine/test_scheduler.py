"""The scheduler's promises, on ranks whose every token depends on the whole context."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serving.errors import ContextLengthExceeded, InvalidRequest
from serving.types import FinishReason
from tests.engine.world import World, expected_output

DEPTHS = [0, 1, 2]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_of_any_length_give_their_tokens(depth: int) -> None:
    world = World(depth=depth)
    prompts = {handle: prompt_of(length, handle) for handle, length in enumerate([1, 3, 4, 5, 15, 16, 17, 40, 63])}
    for handle, prompt in prompts.items():
        world.add(handle, prompt, max_tokens=handle + 1)
    world.run()
    for handle, prompt in prompts.items():
        assert world.outputs[handle] == expected_output(prompt, handle + 1)
        assert world.finished[handle] == FinishReason.LENGTH
    assert world.scheduler.pool.num_owned == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_stop_token_ends_the_row_and_nothing_follows_it(depth: int) -> None:
    world = World(depth=depth)
    prompt = prompt_of(9)
    stop = expected_output(prompt, 6)[-1]
    world.add(1, prompt, max_tokens=50, stop_ids=(stop,))
    world.run()
    assert world.outputs[1] == expected_output(prompt, 50, (stop,))
    assert world.finished[1] == FinishReason.STOP


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("length", [7, 8, 9, 31, 32, 33])
def test_a_second_prompt_hits_all_but_its_last_token(depth: int, length: int) -> None:
    world = World(depth=depth)
    prompt = prompt_of(length)
    world.add(1, prompt)
    world.run()
    world.add(2, prompt)
    world.add(3, prompt, salt=b"another tenant")
    world.run()
    assert world.cached == {1: 0, 2: (length - 1) // 4 * 4, 3: 0}
    assert world.outputs[2] == world.outputs[3] == world.outputs[1]


def test_generated_blocks_are_shared_too() -> None:
    world = World()
    prompt = prompt_of(10)
    world.add(1, prompt, max_tokens=20)
    world.run()
    world.add(2, prompt, max_tokens=20, resume=tuple(world.outputs[1][:11]))
    world.run()
    assert world.cached[2] == 20  # 21 tokens: five full blocks
    assert world.outputs[2] == world.outputs[1]


@pytest.mark.parametrize("depth", DEPTHS)
def test_siblings_wait_for_the_first_and_hit_its_blocks(depth: int) -> None:
    world = World(depth=depth, max_num_batched_tokens=64)
    prompt = prompt_of(33)
    for handle in range(4):
        world.add(handle, prompt)
    world.run()
    assert world.cached == {0: 0, 1: 32, 2: 32, 3: 32}
    assert all(world.outputs[handle] == world.outputs[0] for handle in range(4))


def test_siblings_go_on_when_their_leader_is_cancelled() -> None:
    world = World()
    prompt = prompt_of(33)
    for handle in range(3):
        world.add(handle, prompt)
    world.step()
    world.cancel(0)
    world.run()
    assert world.cached[1] in (0, 12, 16) and world.cached[2] == 32
    assert world.outputs[1] == world.outputs[2] == expected_output(prompt, 8)


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_of_a_cancelled_row_outlive_the_steps_that_touch_them(depth: int) -> None:
    world = World(depth=depth, num_blocks=16)
    world.add(1, prompt_of(10), max_tokens=30)
    for _ in range(4 + depth):
        world.step()
    owned = world.scheduler.pool.num_owned
    world.cancel(1)
    assert world.scheduler.pool.num_owned == (0 if depth == 0 else owned)
    while world.in_flight:
        assert world.scheduler.pool.num_owned == owned
        world.step()
    assert world.scheduler.pool.num_owned == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_preempted_rows_are_recomputed_to_the_same_tokens(depth: int) -> None:
    world = World(depth=depth, num_blocks=24)
    requests = {handle: world.add(handle, prompt_of(8, handle), max_tokens=50) for handle in range(6)}
    world.run()
    assert sum(request.num_preemptions for request in requests.values()) > 0
    assert requests[0].num_preemptions == 0, "the oldest row lost its place"
    for handle in requests:
        assert world.outputs[handle] == expected_output(prompt_of(8, handle), 50)


def test_priority_is_served_first_and_preempts() -> None:
    world = World(max_num_seqs=2)
    for handle in range(4):
        world.add(handle, prompt_of(5, handle), max_tokens=40)
    for _ in range(5):
        world.step()
    world.add(9, prompt_of(5, 9), max_tokens=4, priority=1)
    for _ in range(6):
        world.step()
    assert 9 in world.finished and not world.finished.keys() - {9}
    world.run()
    for handle in range(4):
        assert world.outputs[handle] == expected_output(prompt_of(5, handle), 40)


def test_a_long_prompt_does_not_stop_decoding_rows() -> None:
    world = World(max_num_batched_tokens=8)
    world.add(1, prompt_of(4), max_tokens=60)
    for _ in range(2):
        world.step()
    world.add(2, prompt_of(100), max_tokens=1)
    before = len(world.outputs[1])
    for _ in range(10):
        world.step()
    assert len(world.outputs[1]) == before + 10


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    world = World(num_blocks=8)
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 128 tokens"):
        world.add(1, prompt_of(128))
    with pytest.raises(InvalidRequest, match="may grow to 40 tokens; the replica's KV cache holds 28"):
        world.add(2, prompt_of(20), max_tokens=20)
    assert not world.scheduler.has_work


@pytest.mark.parametrize("seed", range(120))
def test_random_histories(seed: int) -> None:
    """Arrivals, cancels, resumes, shared prefixes, stop tokens and scarce blocks, at every depth and in pipelines."""
    rng = random.Random(seed)
    num_stages = rng.choice([0, 1, 2, 4])
    world = World(
        depth=rng.choice(DEPTHS),
        num_stages=num_stages,
        num_blocks=rng.choice([20, 40, 200]),
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([8, 16, 50]),
        max_model_len=64,
        enable_prefix_cache=rng.random() < 0.8,
    )
    bases = [prompt_of(40, seed * 10 + i) for i in range(3)]
    expected: dict[int, list[int]] = {}
    for handle in range(rng.randint(5, 40)):
        prompt = rng.choice(bases)[: rng.randint(1, 40)] + prompt_of(rng.randint(0, 5), rng.randint(0, 3))
        max_tokens = rng.randint(1, 64 - len(prompt))
        stop_ids = tuple(rng.sample(range(97), rng.randint(0, 3)))
        full = expected_output(prompt, max_tokens, stop_ids)
        resume = tuple(full[: rng.randint(0, len(full) - 1)]) if rng.random() < 0.3 else ()
        world.add(handle, prompt, max_tokens, resume=resume, stop_ids=stop_ids, priority=rng.choice([0, 0, 0, 1]))
        expected[handle] = full
        if rng.random() < 0.2:
            victim = rng.randint(0, handle)
            if victim not in world.finished:
                world.cancel(victim)
                expected.pop(victim, None)
        for _ in range(rng.randint(0, 6)):
            world.step()
    world.run()
    assert {handle: world.outputs[handle] for handle in expected} == expected
    assert world.scheduler.pool.num_owned == 0 and world.scheduler.num_running == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_ten_thousand_cancels_leak_nothing(depth: int) -> None:
    rng = random.Random(depth)
    world = World(depth=depth, num_blocks=40)
    for handle in range(10_000):
        world.add(handle, prompt_of(rng.randint(1, 30), rng.randint(0, 5)), max_tokens=rng.randint(1, 30))
        if rng.random() < 0.3:
            world.step()
        world.cancel(rng.randint(max(0, handle - 6), handle))
        if handle % 7 == 0:
            for victim in range(max(0, handle - 12), handle + 1):
                world.cancel(victim)
    for handle in range(10_000):
        world.cancel(handle)
    world.run()
    assert world.scheduler.pool.num_owned == 0
    assert world.scheduler.num_running == 0 and world.scheduler.num_waiting == 0
    assert world.scheduler.pool.num_free == 39
