"""A link cut after every single token of many choices, in simulated time: 10,000 resumes, not a byte changed."""

from __future__ import annotations

import random
from array import array

from serving import wire
from serving.gateway.link import Cause
from serving.types import NO_LOGPROBS
from tests.gateway.plane import CARD, Client, assert_undisturbed, mixed_clients
from tests.gateway.simulation import SimulatedReplica, World
from tests.scripted import Row, Script


def speak(replica: SimulatedReplica, num_tokens: int, draw: random.Random) -> int:
    """Says up to `num_tokens` of what the script has, in frames of one to three tokens a row, and its ends.

    Returns how many it said: fewer when every row has ended.
    """
    rows = {}
    for handle, submit in replica.submits.items():
        script = Script(submit.prompt_ids, submit.sampling, CARD.tokenizer_size)
        resumed = wire.unpack_ids(submit.resume_ids)
        for token in resumed:
            assert token == script.peek(), "a journal that was never said"
            script.accept(token)
        rows[handle] = Row(handle, submit, script, len(resumed))
    num_said = 0
    while rows and num_said < num_tokens:
        step = wire.Step(1, b"", [], [], [], replica.granted)
        pairs = array("I")
        for row in list(rows.values()):
            if not row.was_admitted:
                row.was_admitted = True
                step.admitted.append((row.handle, row.num_prompt_tokens // 16 * 16))
            for _ in range(draw.randrange(1, 4)):
                if num_said == num_tokens or row.handle not in rows:
                    break
                token = row.script.peek()
                if row.submit.sampling.logprobs != NO_LOGPROBS:
                    step.logprobs.append((len(pairs) // 2, row.script.logprobs()))
                row.script.accept(token)
                row.num_tokens += 1
                num_said += 1
                pairs.extend((row.handle, token))
                end = row.finish(token, CARD)
                if end is not None:
                    step.finished.append(end)
                    del rows[row.handle]
        step.tokens = pairs.tobytes()
        replica.link.receive(step)
    return num_said


def twin(client: Client) -> Client:
    """The same request anew."""
    copy = Client(n=len(client.request.choices), name=client.request.id, deadline=1e9)
    for choice, original in zip(copy.request.choices, client.request.choices, strict=True):
        choice.prompt_ids, choice.sampling = original.prompt_ids, original.sampling
    return copy


def test_every_position_of_every_choice() -> None:
    num_cuts = 0
    for number, original in enumerate(mixed_clients(seed=77, count=240)):
        position, is_whole = 0, False
        while not is_whole:
            draw = random.Random(number * 1000 + position)
            world, client = World(), twin(original)
            world.placement.submit(client.request)
            replica = world.replica()
            is_whole = speak(replica, position, draw) < position
            replica.link.end(Cause.LOST)
            speak(world.replica(), 1 << 30, draw)
            assert_undisturbed(client)
            assert world.placement.num_unfinished == 0
            position += 1
            num_cuts += 1
    assert num_cuts > 10_000


def test_a_choice_that_meets_a_cut_after_every_few_tokens() -> None:
    for number, original in enumerate(mixed_clients(seed=78, count=100)):
        draw = random.Random(number)
        world, client = World(), twin(original)
        world.placement.submit(client.request)
        while world.placement.num_unfinished:
            replica = world.replica()
            speak(replica, len(client.request.choices) * draw.randrange(2, 5), draw)
            replica.link.end(draw.choice((Cause.LOST, Cause.STALLED)))
        assert_undisturbed(client)
