"""The scheduler where things go wrong: garbage logits, lost blocks, requests that are nothing to compute."""

from __future__ import annotations

import numpy as np
import pytest

from serving.errors import InvalidRequest
from tests.engine.test_scheduler import DEPTHS, prompt_of
from tests.engine.world import World, expected_output


def break_slot(world: World, slot: int) -> None:
    """From now on, the ranks find no usable logits for the row in `slot`."""
    run = world.ranks.run

    def run_with_fault(words: np.ndarray) -> np.ndarray:
        ids = run(words)
        num_rows = int(words[1])
        slots, samples = words[8 : 8 + num_rows], words[8 + 3 * num_rows : 8 + 4 * num_rows]
        ids[slots[samples > 0] == slot] = -1
        return ids

    world.ranks.run = run_with_fault  # type: ignore[method-assign]


@pytest.mark.parametrize(("depth", "num_stages"), [*((depth, 0) for depth in DEPTHS), (0, 1), (0, 3)])
def test_a_faulty_row_ends_and_the_others_go_on(depth: int, num_stages: int) -> None:
    world = World(depth=depth, num_stages=num_stages)
    for handle in range(3):
        world.add(handle, prompt_of(6, handle), max_tokens=12)
    for _ in range(4):
        world.step()
    break_slot(world, slot=1)
    failed = []
    while world.scheduler.has_work or world.in_flight:
        output = world.step()
        failed += output.failed if output else []
    assert failed == [(0, 1)]
    assert 1 not in world.finished
    for handle in (0, 2):
        assert world.outputs[handle] == expected_output(prompt_of(6, handle), 12)
    assert world.scheduler.pool.num_owned == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_blocks_of_a_faulty_row_are_never_shared(depth: int) -> None:
    """Its keys and values may be the cause: a second request must not meet the same garbage."""
    world = World(depth=depth)
    prompt = prompt_of(30)
    world.add(1, prompt, max_tokens=3)
    break_slot(world, slot=0)
    world.run()
    assert 1 not in world.finished
    del world.ranks.run
    world.add(2, prompt, max_tokens=3)
    world.run()
    assert world.cached[2] == 0
    assert world.outputs[2] == expected_output(prompt, 3)


@pytest.mark.parametrize("resume", [4, 5])
def test_a_row_with_nothing_left_to_generate_is_refused_not_kept_for_ever(resume: int) -> None:
    world = World()
    outputs = tuple(expected_output(prompt_of(5), resume))
    with pytest.raises(InvalidRequest, match=f"max_tokens is 4; {resume} are there already"):
        world.add(1, prompt_of(5), max_tokens=4, resume=outputs)
    assert not world.scheduler.has_work


def test_a_sibling_of_higher_priority_does_not_wait_for_a_slow_leader() -> None:
    """The leader has the lowest priority and gets no budget while others have prompts to compute."""
    world = World(max_num_batched_tokens=8, num_blocks=200, max_num_seqs=8)
    prompt = prompt_of(60)
    world.add(1, prompt, max_tokens=2, priority=-1)
    world.step()
    for handle in range(10, 14):
        world.add(handle, prompt_of(100, handle), max_tokens=2)
    world.add(2, prompt, max_tokens=2, priority=1)
    for _ in range(20):
        world.step()
    assert 2 in world.finished and 1 not in world.finished
    world.run()
    assert world.outputs[1] == world.outputs[2] == expected_output(prompt, 2)


def test_followers_pass_from_a_slow_leader_to_a_faster_one() -> None:
    world = World(max_num_batched_tokens=8, max_num_seqs=8)
    prompt = prompt_of(60)
    for handle, priority in enumerate([0, 0, 1, 1]):
        world.add(handle, prompt, max_tokens=2, priority=priority)
        world.step()
    world.cancel(2)
    world.run()
    assert world.finished.keys() == {0, 1, 3}
    assert all(world.outputs[handle] == expected_output(prompt, 2) for handle in (0, 1, 3))


def test_a_lost_block_is_noticed_after_the_very_step_that_lost_it() -> None:
    """The random histories check the conservation of blocks after every step: this shows that the check bites."""
    world = World()
    world.add(1, prompt_of(10), max_tokens=3)
    release = world.scheduler.pool.release
    world.scheduler.pool.release = lambda blocks: release(blocks[:-1])  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="reference counts differ"):
        world.run()
    assert world.finished == {1: 1}, "noticed late or early"


def test_a_block_released_too_early_is_noticed() -> None:
    world = World()
    world.add(1, prompt_of(10), max_tokens=3)
    world.step()
    with pytest.raises(AssertionError, match="reference counts differ"):
        world.scheduler.pool.release(world.scheduler.rows.request_in(0).blocks[:1])
        world.step()


def test_a_lost_slot_is_noticed() -> None:
    world = World()
    world.add(1, prompt_of(10), max_tokens=3)
    world.scheduler._free_slots.pop(0)
    with pytest.raises(AssertionError, match="slots are lost"):
        world.step()


def test_step_numbers_outlast_int32() -> None:
    world = World()
    world.scheduler._next_step = 2**31 - 2
    world.add(1, prompt_of(3), max_tokens=5)
    world.run()
    assert world.outputs[1] == expected_output(prompt_of(3), 5)
