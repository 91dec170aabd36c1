"""A real engine driven step by step in the test's thread: no sockets, no timing."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np

from serving.block_hash import root_hash
from serving.config import EngineSettings
from serving.engine.core import EngineCore
from serving.engine.executor import GangExecutor, LocalExecutor
from serving.engine.gang import Gang
from serving.engine.output import StepOutput
from serving.engine.request import Request
from serving.engine.scheduler import Scheduler
from serving.engine.worker import LoadCallback, Worker
from serving.types import SamplingParams


def make_worker(folder: Path, on_load: LoadCallback | None = None, **settings: object) -> Worker:
    defaults = {"max_num_seqs": 32, "max_model_len": 256, "kv_cache_bytes": 1 << 26, "num_threads": 2}
    asked = EngineSettings(model_dir=str(folder), served_model_name="m", **(defaults | settings))
    return Worker(asked, on_load=on_load)


@dataclasses.dataclass
class Transcript:
    """What a reader of one row has seen."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[bytes | None] = dataclasses.field(default_factory=list)
    finish: tuple[int, int] | None = None
    cached: int | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    sampling: SamplingParams


class Engine:
    """A fresh scheduler over a loaded worker."""

    def __init__(
        self,
        worker: Worker,
        *,
        num_blocks: int | None = None,
        budget: int = 256,
        max_num_seqs: int = 32,
        enable_prefix_cache: bool = True,
        async_depth: int = 0,
        gang: Gang | None = None,
    ) -> None:
        """gang: the ranks of which `worker` is the first."""
        self.worker = worker
        num_stages = worker.settings.pipeline_parallel_size
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=worker.max_model_len,
            num_blocks=num_blocks or worker.found.num_blocks,
            block_size=16,
            enable_prefix_cache=enable_prefix_cache,
            num_stages=num_stages,
            sends_inputs=gang is not None,
        )
        self.core = EngineCore(
            self.scheduler,
            LocalExecutor(worker) if gang is None else GangExecutor(worker, gang),
            on_output=self._read,
            on_failure=self._fail,
            async_depth=async_depth if gang is None else num_stages - 1,
        )
        self.seen: dict[int, Transcript] = {}
        self.requests: dict[int, Request] = {}

    def add(self, handle: int, job: Job, resume: tuple[int, ...] = ()) -> None:
        stop_ids = job.sampling.stop_token_ids
        if not job.sampling.ignore_eos:
            stop_ids += tuple(self.worker.config.eos_token_ids)
        request = Request(
            key=(0, handle),
            tokens=np.array(job.prompt + resume, np.int32),
            num_prompt=len(job.prompt),
            max_total=min(len(job.prompt) + job.sampling.max_tokens, self.worker.max_model_len),
            sampling=job.sampling,
            stop_ids=stop_ids,
            priority=0,
            root=root_hash("test", "", b""),
        )
        self.seen[handle] = Transcript()
        self.requests[handle] = request
        self.scheduler.add(request)

    def run(self) -> None:
        while self.scheduler.has_work or self.core.has_steps_in_flight:
            self.core.step()
            self.scheduler.check()
        assert self.scheduler.pool.num_owned == 0

    def _read(self, output: StepOutput) -> None:
        for at, (handle, token) in enumerate(zip(output.handles.tolist(), output.tokens.tolist(), strict=True)):
            self.seen[handle].tokens.append(token)
            self.seen[handle].logprobs.append(output.logprobs.get(at))
        for _, handle, reason, stop_id in output.finished:
            self.seen[handle].finish = (int(reason), stop_id)
        for _, handle, cached in output.admitted:
            self.seen[handle].cached = cached

    def _fail(self, failure: BaseException) -> None:
        raise failure


def alone(worker: Worker, jobs: list[Job], gang: Gang | None = None) -> list[Transcript]:
    """Each job as the only one, its prompt in one piece, nothing cached."""
    transcripts = []
    for job in jobs:
        engine = Engine(worker, enable_prefix_cache=False, gang=gang)
        engine.add(0, job)
        engine.run()
        transcripts.append(engine.seen[0])
    return transcripts


def mixed_jobs(rng: random.Random, count: int, vocab: int, max_prompt: int, max_tokens: int) -> list[Job]:
    """Requests that use every sampling feature, alone and together."""
    jobs = []
    for at in range(count):
        prompt = tuple(rng.randrange(vocab) for _ in range(rng.randint(1, max_prompt)))
        extra: dict[str, object] = {}
        if at % 4:
            extra |= {"temperature": rng.choice([0.3, 1.0, 1.7]), "seed": rng.getrandbits(60)}
        if at % 4 == 2:
            extra |= {"top_p": 0.8, "top_k": rng.choice([0, 5, 50]), "min_p": rng.choice([0.0, 0.02])}
        if at % 3 == 0:
            extra |= {"logprobs": rng.choice([0, 1, 5, 20])}
        if at % 5 == 0:
            extra |= {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
        if at % 7 == 0:
            extra |= {"logit_bias": ((1, 5.0), (2, -100.0)), "min_tokens": 5}
        if at % 11 == 10:
            extra |= {"allowed_token_ids": tuple(range(3, 40))}
        jobs.append(Job(prompt, SamplingParams(max_tokens=rng.randint(1, max_tokens), choice=at % 3, **extra)))
    return jobs
