"""The engine on a CUDA device: the CPU's tokens, and its own whatever happens to a row.

cuBLAS picks kernels by the number of rows, so bits may differ from batch to batch and nothing here asks for equal ones:
two runs must choose the same token until a near-tie decides otherwise, and it must have been one.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

from serving.engine.worker import Worker
from serving.types import SamplingParams
from tests.engine.real import Engine, Job, Transcript, make_worker
from tests.engine.test_equality_of_architectures import COMMON, FAMILIES, VOCABULARY
from tests.tiny import tiny_checkpoint, tiny_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no CUDA device here"),
]

MORE: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {**COMMON, "head_dim": 16, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, COMMON),
    "qwen3": (Qwen3Config, {**COMMON, "head_dim": 128}),
    "gpt_neox": (GPTNeoXConfig, {**COMMON, "num_key_value_heads": None, "rotary_pct": 0.5}),
    "opt": (
        OPTConfig,
        {
            **{"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_dim": 97, "init_std": 0.3},
            **{"vocab_size": VOCABULARY, "max_position_embeddings": 512, "word_embed_proj_dim": 96, "eos_token_id": 2},
        },
    ),
}
ARCHITECTURES = {**FAMILIES, **MORE}
NEAR = {"float32": 2e-3, "bfloat16": 0.26, "float16": 0.03}
"""Differences of log-probabilities that rounding may make, in these tiny models with their wide weights."""


def checkpoint(family: str, folder: Path) -> Path:
    tokenizer = (tiny_model_folder(folder / "llama") / "tokenizer.json").read_bytes()
    made = tiny_checkpoint(folder / "model", *ARCHITECTURES[family], dtype=torch.float32)
    (made / "tokenizer.json").write_bytes(tokenizer)
    return made


def greedy_jobs(count: int, max_prompt: int, max_tokens: int, seed: int = 7) -> list[Job]:
    rng = random.Random(seed)
    jobs = []
    for at in range(count):
        prompt = tuple(rng.randrange(3, VOCABULARY - 30) for _ in range(rng.randint(1, max_prompt)))
        # Alternatives are told of all but every fourth row, which is as plain as a row can be.
        logprobs = {"logprobs": 5} if at % 4 else {}
        jobs.append(Job(prompt, SamplingParams(temperature=0.0, max_tokens=rng.randint(2, max_tokens), **logprobs)))
    return jobs


def told(packed: bytes | None) -> tuple[float, dict[int, float]]:
    """The log-probability of the token, and of the best alternatives by id."""
    assert packed is not None
    return struct.unpack("<f", packed[:4])[0], dict(struct.iter_unpack("<If", packed[4:]))  # type: ignore[arg-type]


def assert_agrees(got: list[Transcript], wanted: list[Transcript], near: float) -> None:
    """The same tokens up to near-ties, and log-probabilities that are close as long as the tokens are the same."""
    num_equal = 0
    for job, (a, b) in enumerate(zip(got, wanted, strict=True)):
        for at, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)):
            scores = None if b.logprobs[at] is None else told(b.logprobs[at])
            if x != y:
                if scores is not None:
                    assert x in scores[1] and scores[0] - scores[1][x] < near, f"job {job}, token {at}: {x}, not {y}"
                break
            if scores is not None:
                assert abs(told(a.logprobs[at])[0] - scores[0]) < near, f"job {job}, token {at}"
        num_equal += a.tokens == b.tokens
    assert num_equal >= 0.7 * len(wanted), f"only {num_equal} of {len(wanted)} rows are equal"


def run(engine: Engine, jobs: list[Job]) -> list[Transcript]:
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
    engine.run()
    return [engine.seen[handle] for handle in range(len(jobs))]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_tokens_of_the_cpu(family: str, tmp_path: Path) -> None:
    folder = checkpoint(family, tmp_path)
    jobs = greedy_jobs(16, 70, 60)
    wanted = run(Engine(make_worker(folder, dtype="float32")), jobs)
    worker = make_worker(folder, dtype="float32", device="cuda")
    assert worker.found.kernels == "triton"
    for depth in (0, 1):
        assert_agrees(run(Engine(worker, budget=64, async_depth=depth), jobs), wanted, NEAR["float32"])


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = checkpoint("llama", tmp_path_factory.mktemp("gpu"))
    return make_worker(folder, dtype=request.param, device="cuda")


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return greedy_jobs(32, 90, 60)


@pytest.fixture(scope="module")
def undisturbed(worker: Worker, jobs: list[Job]) -> list[Transcript]:
    """Each alone."""
    found = []
    for job in jobs:
        engine = Engine(worker, enable_prefix_cache=False)
        engine.add(0, job)
        engine.run()
        found.append(engine.seen[0])
    return found


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("budget", [33, 256])
def test_company_and_chunks(
    worker: Worker, jobs: list[Job], undisturbed: list[Transcript], budget: int, depth: int
) -> None:
    got = run(Engine(worker, budget=budget, async_depth=depth), jobs)
    assert_agrees(got, undisturbed, NEAR[worker.settings.dtype])


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_and_recomputed(worker: Worker, depth: int) -> None:
    jobs = greedy_jobs(16, 12, 120, seed=8)
    wanted = run(Engine(worker, enable_prefix_cache=False), jobs)
    engine = Engine(worker, num_blocks=16, enable_prefix_cache=False, async_depth=depth)
    got = run(engine, jobs)
    assert sum(request.num_preemptions for request in engine.requests.values()) >= 3
    assert_agrees(got, wanted, NEAR[worker.settings.dtype])


@pytest.mark.parametrize("length", [15, 16, 17, 95, 96, 97])
def test_prefix_hits(worker: Worker, length: int) -> None:
    rng = random.Random(length)
    prompt = tuple(rng.randrange(3, VOCABULARY - 30) for _ in range(length))
    job = Job(prompt, SamplingParams(temperature=0.0, max_tokens=20, logprobs=5))
    engine = Engine(worker, async_depth=1)
    for handle in range(3):
        engine.add(handle, job)
        engine.run()
    assert [engine.seen[handle].cached for handle in range(3)] == [0, *[(length - 1) // 16 * 16] * 2]
    assert_agrees([engine.seen[1], engine.seen[2]], [engine.seen[0]] * 2, NEAR[worker.settings.dtype])


def test_resumed_at_every_position(worker: Worker, jobs: list[Job], undisturbed: list[Transcript]) -> None:
    engine, cuts = Engine(worker, async_depth=1), []
    for job, whole in list(zip(jobs, undisturbed, strict=True))[:12]:
        for cut in range(0, len(whole.tokens), 3):
            engine.add(len(cuts), job, resume=tuple(whole.tokens[:cut]))
            cuts.append((cut, whole))
    engine.run()
    rests = [Transcript(whole.tokens[cut:], whole.logprobs[cut:]) for cut, whole in cuts]
    assert_agrees([engine.seen[handle] for handle in range(len(cuts))], rests, NEAR[worker.settings.dtype])
