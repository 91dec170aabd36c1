"""Gangs compute what one rank computes, and each of them the same bytes whatever happens to a row (C4, C11)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.types import SamplingParams
from tests.engine.gangs import Ready, gang_of
from tests.engine.real import Engine, Job, Transcript, alone, mixed_jobs
from tests.tiny import tiny_model_folder

SEED = 20261124
SHAPES = [(2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that stages are unequal, and a vocabulary that two ranks cannot divide."""
    return tiny_model_folder(tmp_path_factory.mktemp("gang"), num_hidden_layers=3, vocab_size=321)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"tp{shape[0]}pp{shape[1]}")
def gang(request: pytest.FixtureRequest, folder: Path) -> Iterator[Ready]:
    tp, pp = request.param
    with gang_of(folder, tp, pp, dtype="float32") as ready:
        yield ready


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return mixed_jobs(random.Random(SEED), 12, 299, max_prompt=60, max_tokens=24)


@pytest.fixture(scope="module")
def undisturbed(gang: Ready, jobs: list[Job]) -> list[Transcript]:
    return alone(gang.worker, jobs, gang.gang)


def greedy_jobs(seed: int, count: int) -> list[Job]:
    rng = random.Random(seed)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
    return [Job(tuple(rng.randrange(299) for _ in range(rng.randint(1, 60))), sampling) for _ in range(count)]


def run_together(engine: Engine, jobs: list[Job]) -> list[Transcript]:
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
    engine.run()
    return [engine.seen[handle] for handle in range(len(jobs))]


def assert_same(got: list[Transcript], wanted: list[Transcript]) -> None:
    for at, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a.tokens, a.logprobs, a.finish) == (b.tokens, b.logprobs, b.finish), f"job {at}"


def test_the_tokens_are_those_of_one_rank(gang: Ready, folder: Path) -> None:
    jobs = greedy_jobs(SEED, 12)
    with gang_of(folder, dtype="float32") as one:
        wanted = run_together(Engine(one.worker), jobs)
        assert one.worker.found.fingerprint != gang.worker.found.fingerprint
    got = run_together(Engine(gang.worker, gang=gang.gang), jobs)
    assert [seen.tokens for seen in got] == [seen.tokens for seen in wanted]


def test_alone_is_as_in_a_batch(gang: Ready, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    assert any(any(seen.logprobs) for seen in undisturbed)
    engine = Engine(gang.worker, gang=gang.gang, enable_prefix_cache=False)
    assert_same(run_together(engine, jobs), undisturbed)


def test_chunking_changes_nothing(gang: Ready, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    assert_same(run_together(Engine(gang.worker, gang=gang.gang, budget=33), jobs), undisturbed)


def test_arrival_in_the_middle_changes_nothing(gang: Ready, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    rng = random.Random(SEED)
    engine = Engine(gang.worker, gang=gang.gang, max_num_seqs=5, budget=40)
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
        for _ in range(rng.randint(0, 4)):
            engine.core.step()
    engine.run()
    assert_same([engine.seen[handle] for handle in range(len(jobs))], undisturbed)


def test_preempted_and_recomputed(gang: Ready) -> None:
    sampling = {"max_tokens": 60, "ignore_eos": True, "logprobs": 1, "frequency_penalty": 0.5}
    jobs = [Job((3, handle), SamplingParams(temperature=handle % 2, seed=handle, **sampling)) for handle in range(5)]
    engine = Engine(gang.worker, gang=gang.gang, num_blocks=8, enable_prefix_cache=False)
    got = run_together(engine, jobs)
    assert sum(request.num_preemptions for request in engine.requests.values()) >= 3
    assert_same(got, alone(gang.worker, jobs, gang.gang))


def test_prefix_hits_change_nothing(gang: Ready) -> None:
    rng = random.Random(SEED)
    prompt = tuple(rng.randrange(299) for _ in range(33))
    jobs = [
        Job(prompt, SamplingParams(temperature=temperature, seed=7, max_tokens=20, logprobs=3))
        for temperature in (0.0, 1.0)
    ]
    wanted = alone(gang.worker, jobs, gang.gang)
    engine = Engine(gang.worker, gang=gang.gang)
    for handle, job in enumerate(jobs + jobs):
        engine.add(handle, job)
        engine.run()
    assert [engine.seen[handle].cached for handle in range(4)] == [0, 32, 32, 32]
    assert_same([engine.seen[handle] for handle in range(4)], wanted + wanted)


def test_resumed_anywhere(gang: Ready, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    engine = Engine(gang.worker, gang=gang.gang)
    cuts = [
        (job, whole, cut)
        for job, whole in zip(jobs, undisturbed, strict=True)
        for cut in range(0, len(whole.tokens), 3)
    ]
    for handle, (job, whole, cut) in enumerate(cuts):
        engine.add(handle, job, resume=tuple(whole.tokens[:cut]))
    engine.run()
    assert len(cuts) > 20
    for handle, (_, whole, cut) in enumerate(cuts):
        seen = engine.seen[handle]
        assert (seen.tokens, seen.logprobs, seen.finish) == (whole.tokens[cut:], whole.logprobs[cut:], whole.finish)


def test_what_moves_the_tensors_changes_nothing(gang: Ready, folder: Path, jobs: list[Job]) -> None:
    """The fingerprint leaves it out; this is why it may."""
    wanted = run_together(Engine(gang.worker, gang=gang.gang), jobs)
    sizes = gang.worker.settings.tensor_parallel_size, gang.worker.settings.pipeline_parallel_size
    with gang_of(folder, *sizes, dtype="float32", collectives="gloo") as other:
        assert other.worker.found.fingerprint == gang.worker.found.fingerprint
        assert_same(run_together(Engine(other.worker, gang=other.gang), jobs), wanted)


@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (1, 3)])
def test_fewer_kv_heads_than_ranks_and_a_layer_per_stage(folder: Path, tp: int, pp: int) -> None:
    jobs = greedy_jobs(SEED + 2, 8)
    with gang_of(folder, dtype="float32") as one, gang_of(folder, tp, pp, dtype="float32") as many:
        wanted = run_together(Engine(one.worker), jobs)
        got = run_together(Engine(many.worker, gang=many.gang), jobs)
        assert [seen.tokens for seen in got] == [seen.tokens for seen in wanted]


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_gangs_are_exact_in_other_formats_too(folder: Path, jobs: list[Job], quantization: str) -> None:
    with gang_of(folder, 2, 2, dtype="bfloat16", quantization=quantization) as gang:
        together = run_together(Engine(gang.worker, gang=gang.gang, budget=33), jobs)
        assert_same(together, alone(gang.worker, jobs, gang.gang))
