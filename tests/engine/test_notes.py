"""What a step's output says of rows beside their tokens: chunks, waits, preemptions."""

from __future__ import annotations

import random
from collections import Counter

from serving.engine.output import StepOutput
from serving.types import Note, Wait
from tests.engine.world import World


class Heard:
    """The notes of every output, and the sums that they must agree with."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.notes: list[tuple[int, Note, int]] = []

    def run(self) -> None:
        world = self.world
        while world.scheduler.has_work or world.in_flight:
            output = world.step()
            if isinstance(output, StepOutput):
                self.notes += [(handle, kind, value) for _, handle, kind, value in output.notes]

    def of(self, kind: Note, handle: int | None = None) -> list[int]:
        return [value for owner, what, value in self.notes if what is kind and handle in (None, owner)]


def test_chunks_waits_and_preemptions_add_up_over_random_histories() -> None:
    for seed in range(12):
        draw = random.Random(seed)
        world = World(depth=seed % 2, num_blocks=20, max_num_seqs=6, max_num_batched_tokens=12)
        heard = Heard(world)
        requests, prompts = {}, {}
        for handle in range(24):
            prompts[handle] = [draw.randrange(90) for _ in range(draw.randrange(2, 30))]
            requests[handle] = world.add(handle, prompts[handle], draw.randrange(1, 20), priority=draw.randrange(2))
        heard.run()
        preempted = Counter(handle for handle, kind, _ in heard.notes if kind is Note.PREEMPTED)
        assert preempted == Counter({h: r.num_preemptions for h, r in requests.items() if r.num_preemptions}), seed
        assert sum(preempted.values()) == world.scheduler.tally.num_preemptions
        for handle, prompt in prompts.items():
            if preempted[handle]:
                continue
            # Pieces of one token, where a step had no more to give, are no chunks.
            left = len(prompt) - world.cached[handle] - sum(heard.of(Note.CHUNK, handle))
            assert 0 <= left <= 2, (seed, handle)
        assert world.scheduler.tally.prefill_tokens == 0  # the loop's to count, not the scheduler's
    assert sum(preempted.values()) > 0, "no history preempted: the sums above were never tried"


def test_a_preempted_row_computes_again_what_it_gave_up() -> None:
    world = World(num_blocks=9, max_num_batched_tokens=64)
    heard = Heard(world)
    for handle in range(2):
        world.add(handle, [handle] * 8, 16)
    heard.run()
    (victim,) = {handle for handle, kind, _ in heard.notes if kind is Note.PREEMPTED}
    order = [kind for handle, kind, _ in heard.notes if handle == victim]
    assert order == [Note.CHUNK, Note.PREEMPTED, Note.WAITED, Note.CHUNK]
    (given_up,) = heard.of(Note.PREEMPTED, victim)
    assert heard.of(Note.WAITED, victim) == [Wait.BLOCKS]
    first, again = heard.of(Note.CHUNK, victim)
    # Full blocks may be found in the cache again; the token that was sampled last is computed for the first time.
    assert first == 8 and again <= given_up + 1


def test_every_wait_has_its_cause() -> None:
    def causes(world: World, prompts: list[list[int]]) -> list[int]:
        heard = Heard(world)
        for handle, prompt in enumerate(prompts):
            world.add(handle, prompt, 4)
        heard.run()
        return heard.of(Note.WAITED)

    different = [[1] * 8, [2] * 8]
    assert causes(World(max_num_seqs=1), different) == [Wait.SLOTS]
    assert causes(World(max_num_batched_tokens=8), different) == [Wait.BUDGET]
    assert causes(World(num_blocks=6, max_num_batched_tokens=64), different) == [Wait.BLOCKS]
    assert causes(World(max_num_batched_tokens=64), [[3] * 9, [3] * 9]) == [Wait.PREFIX]
    assert causes(World(max_num_batched_tokens=64), different) == []


def test_a_cancelled_row_is_not_told_of() -> None:
    world = World(depth=1)
    world.add(0, [5] * 12)
    world.step()
    world.cancel(0)
    heard = Heard(world)
    heard.run()
    assert heard.notes == []
