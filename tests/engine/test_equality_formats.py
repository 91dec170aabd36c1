"""Same request, same bytes (C4) in every weight format: what test_equality shows for bf16 and fp32 at length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from serving.engine.worker import Worker
from tests.engine.real import Engine, Job, Transcript, alone, make_worker, mixed_jobs
from tests.tiny import tiny_model_folder

SEED = 20261124
FORMATS = [("bfloat16", "int8"), ("bfloat16", "int4"), ("float16", "none")]


@pytest.fixture(scope="module", params=FORMATS, ids="-".join)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tiny_model_folder(tmp_path_factory.mktemp("tiny"))
    dtype, quantization = request.param
    worker = make_worker(Path(folder), dtype=dtype, quantization=quantization)
    assert worker.found.is_exact, "the kernels of this machine do not claim exactness"
    assert worker.model.weight_format == (dtype if quantization == "none" else quantization)
    return worker


@pytest.fixture(scope="module")
def jobs(worker: Worker) -> list[Job]:
    return mixed_jobs(random.Random(SEED), 24, worker.model.logits_size, max_prompt=100, max_tokens=24)


@pytest.fixture(scope="module")
def undisturbed(worker: Worker, jobs: list[Job]) -> list[Transcript]:
    return alone(worker, jobs)


def run_together(engine: Engine, jobs: list[Job]) -> list[Transcript]:
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
    engine.run()
    return [engine.seen[handle] for handle in range(len(jobs))]


def assert_same(got: list[Transcript], wanted: list[Transcript]) -> None:
    for at, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a.tokens, a.logprobs, a.finish) == (b.tokens, b.logprobs, b.finish), f"job {at}"


def test_batches_and_chunks_change_nothing(worker: Worker, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    assert any(any(transcript.logprobs) for transcript in undisturbed)
    for budget in (256, 33):
        assert_same(run_together(Engine(worker, budget=budget), jobs), undisturbed)


def test_preempted_and_recomputed(worker: Worker) -> None:
    jobs = mixed_jobs(random.Random(SEED + 1), 12, worker.model.logits_size, max_prompt=12, max_tokens=100)
    engine = Engine(worker, num_blocks=12, enable_prefix_cache=False)
    got = run_together(engine, jobs)
    assert sum(request.num_preemptions for request in engine.requests.values()) >= 2
    assert_same(got, alone(worker, jobs))


def test_resumed(worker: Worker, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    engine = Engine(worker)
    for handle, (job, whole) in enumerate(zip(jobs, undisturbed, strict=True)):
        engine.add(handle, job, resume=tuple(whole.tokens[: len(whole.tokens) // 2]))
    engine.run()
    for handle, whole in enumerate(undisturbed):
        cut = len(whole.tokens) // 2
        assert engine.seen[handle].tokens == whole.tokens[cut:]
        assert engine.seen[handle].logprobs == whole.logprobs[cut:]


def test_formats_are_not_taken_for_each_other(worker: Worker, tmp_path: Path) -> None:
    """A stream must not move to a replica that computes in another format."""
    plain = make_worker(tiny_model_folder(tmp_path), dtype=worker.settings.dtype, max_num_seqs=1)
    is_same = worker.settings.quantization == "none"
    assert (plain.found.fingerprint == worker.found.fingerprint) is is_same
