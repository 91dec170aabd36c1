"""Same request, same bytes (C4): a row's tokens and logprob bits do not depend on its company or its history.

Every comparison is bitwise, against the same request alone in an idle engine without a cache.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from serving.engine.worker import Worker
from serving.types import SamplingParams
from tests.engine.real import Engine, Job, alone, make_worker, mixed_jobs
from tests.tiny import tiny_model_folder

SEED = 20261123


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tiny_model_folder(tmp_path_factory.mktemp("tiny"))
    worker = make_worker(Path(folder), dtype=request.param)
    assert worker.found.is_exact, "the kernels of this machine do not claim exactness"
    return worker


@pytest.fixture(scope="module")
def jobs(worker: Worker) -> list[Job]:
    return mixed_jobs(random.Random(SEED), 32, worker.model.logits_size, max_prompt=100, max_tokens=40)


@pytest.fixture(scope="module")
def undisturbed(worker: Worker, jobs: list[Job]) -> list[object]:
    return list(alone(worker, jobs))


def run_together(engine: Engine, jobs: list[Job]) -> list[object]:
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
    engine.run()
    return [engine.seen[handle] for handle in range(len(jobs))]


def assert_same(got: list[object], wanted: list[object]) -> None:
    for at, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.tokens == b.tokens, f"job {at}"
        assert a.logprobs == b.logprobs, f"job {at}"
        assert a.finish == b.finish, f"job {at}"


def test_alone_is_as_in_a_batch_of_32(worker: Worker, jobs: list[Job], undisturbed: list[object]) -> None:
    assert any(any(t.logprobs) for t in undisturbed)
    assert_same(run_together(Engine(worker, enable_prefix_cache=False), jobs), undisturbed)


def test_a_step_in_flight_changes_nothing(worker: Worker, jobs: list[Job], undisturbed: list[object]) -> None:
    """The loop submits a step before it has read the one before (C5); stops are learnt a step late."""
    assert_same(run_together(Engine(worker, async_depth=1, budget=64), jobs), undisturbed)


@pytest.mark.parametrize("budget", [32, 33, 47, 64, 111])
def test_chunking_changes_nothing(worker: Worker, jobs: list[Job], undisturbed: list[object], budget: int) -> None:
    assert_same(run_together(Engine(worker, budget=budget), jobs), undisturbed)


def test_order_of_arrival_changes_nothing(worker: Worker, jobs: list[Job], undisturbed: list[object]) -> None:
    rng = random.Random(SEED)
    engine = Engine(worker, max_num_seqs=8, budget=40)
    order = list(range(len(jobs)))
    rng.shuffle(order)
    for handle in order:
        engine.add(handle, jobs[handle])
        for _ in range(rng.randint(0, 5)):
            engine.core.step()
    engine.run()
    assert_same([engine.seen[handle] for handle in range(len(jobs))], undisturbed)


def test_preempted_and_recomputed(worker: Worker) -> None:
    jobs = mixed_jobs(random.Random(SEED + 1), 16, worker.model.logits_size, max_prompt=12, max_tokens=120)
    engine = Engine(worker, num_blocks=16, enable_prefix_cache=False)
    got = run_together(engine, jobs)
    assert sum(request.num_preemptions for request in engine.requests.values()) >= 5
    assert_same(got, alone(worker, jobs))


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 95, 96, 97])
def test_prefix_hits_change_nothing(worker: Worker, length: int) -> None:
    rng = random.Random(length)
    prompt = tuple(rng.randrange(worker.model.logits_size) for _ in range(length))
    jobs = [
        Job(prompt, SamplingParams(temperature=0.0, max_tokens=20, logprobs=3)),
        Job(prompt, SamplingParams(temperature=1.0, seed=7, max_tokens=20, logprobs=3)),
    ]
    wanted = alone(worker, jobs)
    engine = Engine(worker)
    for handle, job in enumerate(jobs + jobs):
        engine.add(handle, job)
        engine.run()
    hit = (length - 1) // 16 * 16
    assert [engine.seen[handle].cached for handle in range(4)] == [0, hit, hit, hit]
    assert_same([engine.seen[handle] for handle in range(4)], wanted + wanted)


def test_resumed_at_every_position(worker: Worker, jobs: list[Job], undisturbed: list[object]) -> None:
    engine = Engine(worker)
    cuts = []
    for job, whole in zip(jobs, undisturbed, strict=True):
        for cut in range(len(whole.tokens)):
            handle = len(cuts)
            cuts.append((cut, whole))
            engine.add(handle, job, resume=tuple(whole.tokens[:cut]))
    engine.run()
    assert len(cuts) > 300
    for handle, (cut, whole) in enumerate(cuts):
        assert engine.seen[handle].tokens == whole.tokens[cut:]
        assert engine.seen[handle].logprobs == whole.logprobs[cut:]
        assert engine.seen[handle].finish == whole.finish


def test_the_number_of_threads_changes_nothing(worker: Worker, jobs: list[Job], undisturbed: list[object]) -> None:
    """The fingerprint leaves the thread count out; this is why it may."""
    from models.ops.select import set_num_threads

    set_num_threads(1)
    try:
        assert_same(run_together(Engine(worker), jobs), undisturbed)
    finally:
        set_num_threads(2)
