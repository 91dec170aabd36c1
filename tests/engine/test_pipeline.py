"""Steps of a pipeline: several stages compute at the same time, each for other rows (C5, C11)."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.budget import take_turns
from tests.engine.test_scheduler import prompt_of
from tests.engine.world import World, expected_output

STAGES = [1, 2, 3, 4]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_decoding_rows_form_as_many_groups_as_stages() -> None:
    assert take_turns(ints(1, 1, 1, 1, 1), ints(1, 1, 1, 1, 1), 2).tolist() == [1, 1, 1, 0, 0]
    assert take_turns(ints(1, 1, 1, 1, 1), ints(0, 0, 0, 1, 1), 2).tolist() == [0, 0, 0, 1, 1]
    assert take_turns(ints(1, 1), ints(1, 1), 1).tolist() == [1, 1]


def test_a_prompts_next_chunk_follows_its_previous_one_into_the_pipe() -> None:
    assert take_turns(ints(1, 30, 1, 7), ints(1, 30, 1, 7), 4).tolist() == [1, 30, 0, 7]
    world = World(num_stages=4, max_num_batched_tokens=8)
    world.add(1, prompt_of(32), max_tokens=2)
    for _ in range(3):
        assert world.step() is None
    assert [plan.starts.tolist() for plan, _ in world.in_flight] == [[0], [8], [16]]


@pytest.mark.parametrize("num_stages", STAGES)
def test_every_stage_has_rows_of_its_own(num_stages: int) -> None:
    world = World(num_stages=num_stages)
    for handle in range(8):
        world.add(handle, prompt_of(2, handle), max_tokens=40)
    for _ in range(20):
        world.step()
    sizes = []
    for _ in range(16):
        world.step()
        rows = [set(plan.slots.tolist()) for plan, _ in world.in_flight]
        assert len(rows) == num_stages - 1
        assert len(set().union(*rows)) == sum(map(len, rows)), "a row is in two steps"
        sizes += map(len, rows)
    assert set(sizes) <= {-(-8 // num_stages), 8 - (num_stages - 1) * -(-8 // num_stages)}
    world.run()
    for handle in range(8):
        assert world.outputs[handle] == expected_output(prompt_of(2, handle), 40)


@pytest.mark.parametrize("num_stages", STAGES)
@pytest.mark.parametrize("num_rows", [1, 3, 5, 7])
def test_no_row_waits_longer_than_once_around_the_pipe(num_stages: int, num_rows: int) -> None:
    world = World(num_stages=num_stages)
    for handle in range(num_rows):
        world.add(handle, prompt_of(2, handle), max_tokens=100)
    for _ in range(20):
        world.step()
    before = {handle: len(world.outputs[handle]) for handle in range(num_rows)}
    for _ in range(2 * num_stages * 10):
        world.step()
    for handle in range(num_rows):
        assert len(world.outputs[handle]) - before[handle] >= 10


@pytest.mark.parametrize("num_stages", STAGES)
def test_rows_are_cancelled_while_their_steps_are_in_the_pipe(num_stages: int) -> None:
    world = World(num_stages=num_stages, num_blocks=30)
    for handle in range(6):
        world.add(handle, prompt_of(9, handle), max_tokens=30)
    for _ in range(12):
        world.step()
    for handle in range(0, 6, 2):
        world.cancel(handle)
    world.run()
    assert world.finished.keys() == {1, 3, 5}
    assert world.scheduler.pool.num_owned == 0 and world.scheduler.num_running == 0


@pytest.mark.parametrize("num_stages", STAGES)
def test_rows_are_preempted_while_their_steps_are_in_the_pipe(num_stages: int) -> None:
    world = World(num_stages=num_stages, num_blocks=24)
    requests = {handle: world.add(handle, prompt_of(8, handle), max_tokens=50) for handle in range(6)}
    world.run()
    assert sum(request.num_preemptions for request in requests.values()) > 0
    for handle in requests:
        assert world.outputs[handle] == expected_output(prompt_of(8, handle), 50)
