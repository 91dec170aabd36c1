"""Tokens that stay on the device, and padded batches of recorded steps: the bits of the plain runner.

There is no GPU here: the kernels are the CPU's exact ones, sampling runs under Triton's interpreter, and what a graph
would replay is computed. So every comparison is bitwise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.kv_cache import KVCache
from models.ops.kernels import NUM_SAMPLING_FIELDS
from models.ops.triton_sampling import floors
from serving.engine.device_sampler import UNREAD, DeviceSampler
from serving.engine.graphs import StepGraphs, ladder
from serving.engine.plan import NO_IDS, Plan
from serving.engine.runner import FAULTY, ModelRunner
from serving.engine.sampling_rows import SamplingRows
from serving.engine.step_arrays import step_arrays
from serving.engine.worker import Worker
from serving.types import SamplingParams
from tests.engine.real import Engine, Job, Transcript, make_worker
from tests.tiny import tiny_model_folder

CPU = torch.device("cpu")
SLOTS = 4
AT_HOST: dict[str, object] = {"logprobs": 3, "frequency_penalty": 0.8}


@pytest.fixture(autouse=True)
def _quiet_infinities() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of them."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return make_worker(Path(tiny_model_folder(tmp_path_factory.mktemp("tiny"))), max_num_seqs=SLOTS, num_threads=1)


@pytest.fixture
def on_device(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """The same worker whose runner samples as on a device, without graphs."""
    sampling = SamplingRows(SLOTS, worker.model.logits_size, worker.model.logits_size - 21, worker.config.eos_token_ids)
    runner = ModelRunner(
        worker.model,
        worker.runner.kv_cache,
        sampling,
        max_num_seqs=SLOTS,
        max_model_len=worker.max_model_len,
        block_size=16,
        device=CPU,
        samples_on_device=True,
    )
    monkeypatch.setattr(worker, "runner", runner)
    return worker


def greedy(count: int, max_prompt: int, max_tokens: int, **every_third: object) -> list[Job]:
    rng, jobs = random.Random(3), []
    for at in range(count):
        prompt = tuple(rng.randrange(3, 290) for _ in range(rng.randint(1, max_prompt)))
        more = every_third if at % 3 == 2 else {}
        num_tokens = rng.randint(max_tokens // 2, max_tokens)
        jobs.append(Job(prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens, **more)))
    return jobs


def run(engine: Engine, jobs: list[Job]) -> list[Transcript]:
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
    engine.run()
    return [engine.seen[handle] for handle in range(len(jobs))]


@pytest.mark.parametrize(
    ("has_graphs", "depth", "every_third"),
    [(False, 0, {}), (False, 1, {}), (False, 1, AT_HOST), (True, 0, AT_HOST), (True, 1, {}), (True, 1, AT_HOST)],
)
def test_tokens_left_on_the_device_are_the_hosts(
    worker: Worker, on_device: Worker, has_graphs: bool, depth: int, every_third: dict[str, object]
) -> None:
    """Few blocks, so that rows are preempted with tokens in flight; slots change hands; rows of both samplers mix."""
    jobs = greedy(6, 14, 44, **every_third)
    plain = make_worker(Path(worker.settings.model_dir), max_num_seqs=SLOTS, num_threads=1)
    wanted = run(Engine(plain, max_num_seqs=SLOTS), jobs)
    if has_graphs:
        on_device.runner.prepare(20, has_graphs=True)
    engine = Engine(on_device, max_num_seqs=SLOTS, num_blocks=7, budget=20, async_depth=depth)
    got = run(engine, jobs)
    assert sum(request.num_preemptions for request in engine.requests.values()) > 0
    for a, b in zip(got, wanted, strict=True):
        assert (a.tokens, a.logprobs, a.finish) == (b.tokens, b.logprobs, b.finish)


def test_random_rows_do_not_depend_on_company_depth_or_graphs(on_device: Worker) -> None:
    rng, jobs = random.Random(4), []
    for at in range(5):
        cut = {"top_k": 9, "top_p": 0.9} if at == 3 else {"temperature": 1e-6} if at == 4 else {}
        sampling = SamplingParams(**{"temperature": 0.9, "max_tokens": 7, "seed": at, "choice": at % 2, **cut})
        jobs.append(Job(tuple(rng.randrange(3, 290) for _ in range(rng.randint(1, 20))), sampling))
    alone = [run(Engine(on_device, max_num_seqs=SLOTS, enable_prefix_cache=False), [job])[0] for job in jobs]
    assert len({tuple(t.tokens) for t in alone}) == len(jobs)
    on_device.runner.prepare(20, has_graphs=True)
    for depth in (0, 1):
        together = run(Engine(on_device, max_num_seqs=SLOTS, budget=20, async_depth=depth), jobs)
        assert [t.tokens for t in together] == [t.tokens for t in alone]
    resumed = Engine(on_device, max_num_seqs=SLOTS, async_depth=1)
    for handle, (job, whole) in enumerate(zip(jobs, alone, strict=True)):
        resumed.add(handle, job, resume=tuple(whole.tokens[:3]))
    resumed.run()
    assert [resumed.seen[handle].tokens for handle in range(5)] == [t.tokens[3:] for t in alone]


def test_garbage_fails_its_row_and_no_other(on_device: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, steps = on_device.model.forward, iter(range(1000))

    def poisoned(*arguments: object) -> torch.Tensor:
        logits = forward(*arguments)
        if next(steps) == 6:
            logits[0] = torch.nan
        return logits

    jobs = greedy(3, 10, 30)
    wanted = run(Engine(on_device, max_num_seqs=SLOTS, enable_prefix_cache=False), jobs)
    monkeypatch.setattr(on_device.model, "forward", poisoned)
    engine = Engine(on_device, max_num_seqs=SLOTS, enable_prefix_cache=False, async_depth=1)
    got = run(engine, jobs)
    failed = [at for at, transcript in enumerate(got) if transcript.finish is None]
    assert len(failed) == 1 and FAULTY not in got[failed[0]].tokens
    for at in {0, 1, 2} - set(failed):
        assert got[at].tokens == wanted[at].tokens


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 32, 100, 256, 1000])
def test_the_ladder_reaches_the_largest_batch_with_little_padding(most: int) -> None:
    sizes = ladder(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows <= rows * 0.25
    assert len(sizes) <= 4 * most.bit_length()


@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "mixed"])
def test_padding_writes_to_the_sink_alone_and_leaves_no_token(worker: Worker, is_decode: bool) -> None:
    sampling = SamplingRows(10, worker.model.logits_size, worker.model.logits_size, ())
    sampler = DeviceSampler(sampling, CPU)
    cache = KVCache(worker.config, worker.model.kernels, 11, 16, torch.bfloat16)
    graphs = StepGraphs(worker.model, cache, sampler, max_num_seqs=10, max_model_len=64, max_num_tokens=24, device=CPU)
    assert graphs.sizes == ([1, 2, 3, 4, 5, 6, 7, 8, 10], [16, 24])
    for kv in cache.layers:
        kv.key.fill_(7.0)  # type: ignore[union-attr]
        kv.value.fill_(7.0)  # type: ignore[union-attr]
    before = [(kv.key.clone(), kv.value.clone()) for kv in cache.layers if kv is not None]
    slots, starts = np.array([6, 1, 3, 0, 5, 7, 8, 9, 4], np.int32), np.array([0, 3, 15, 1, 2, 5, 6, 7, 8], np.int32)
    tables, tokens = np.zeros((10, 4), np.int32), np.full((10, 64), 20, np.int32)
    tables[slots, 0] = np.arange(2, 11)
    sampler.latest.fill_(UNREAD - 5)
    counts, samples = np.ones(9, np.int32), np.ones(9, np.int32)
    if not is_decode:
        counts[[1, 4]], samples[1] = [4, 3], 0
    plan = Plan(0, slots, counts, starts, samples, NO_IDS, NO_IDS.reshape(0, 3), NO_IDS, ())
    step = step_arrays(plan, tokens, tables, 16)
    graph = graphs.find(step)
    assert graph is not None and (graph.num_tokens, graph.num_rows) == ((10, 10) if is_decode else (16, 10))
    with torch.inference_mode():
        logits, chosen = graphs.run(graph, step, step.ends, tables, is_table_new=True)
    assert len(logits) == len(chosen) == samples.sum()
    assert floors(graph.logits, graph.fields.rows[-NUM_SAMPLING_FIELDS:], 9).isneginf().all(), "padding is cut off"
    sampled = slots[samples > 0].tolist()
    assert (sampler.latest[sampled] == chosen[:, 0]).all()
    others = sorted(set(range(10)) - set(sampled))
    assert (sampler.latest[others] == UNREAD - 5).all()
    for kv, (key, value) in zip(cache.layers, before, strict=True):
        assert kv is not None
        changed = (kv.key != key).flatten(1).any(1) | (kv.value != value).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [0, *range(2, 11)]
