"""An engine of one rank, driven in this thread: what is measured is the engine, not its front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.block_hash import root_hash
from serving.engine.core import EngineCore
from serving.engine.executor import LocalExecutor
from serving.engine.output import StepOutput
from serving.engine.request import Request
from serving.engine.scheduler import Scheduler
from serving.engine.worker import Worker
from serving.types import SamplingParams


class Bench:
    """Scheduler and step loop over a loaded worker, without threads."""

    def __init__(self, worker: Worker, budget: int, async_depth: int = 0) -> None:
        """budget: tokens per step. async_depth: steps in flight beyond the one being read."""
        settings = worker.settings
        self.scheduler = Scheduler(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=worker.max_model_len,
            num_blocks=worker.found.num_blocks,
            block_size=settings.block_size,
            enable_prefix_cache=False,
        )
        self.core = EngineCore(
            self.scheduler,
            LocalExecutor(worker),
            on_output=self._read,
            on_failure=self._fail,
            async_depth=async_depth,
        )
        self.tokens: dict[int, list[int]] = {}
        self._vocab = worker.model.logits_size

    def add(self, handle: int, prompt: Sequence[int], max_tokens: int, temperature: float = 0.0) -> None:
        """A row that ignores the end of sequence, greedy unless said."""
        self.tokens[handle] = []
        self.scheduler.add(
            Request(
                key=(0, handle),
                tokens=np.array(prompt, np.int32),
                num_prompt=len(prompt),
                max_total=len(prompt) + max_tokens,
                sampling=SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=handle),
                stop_ids=(),
                priority=0,
                root=root_hash("bench", "", b""),
            )
        )

    def random_prompt(self, seed: int, length: int) -> list[int]:
        """Token ids without a meaning."""
        return np.random.default_rng(seed).integers(10, self._vocab - 10, length).tolist()

    def run(self) -> None:
        """Until every row has ended."""
        while self.scheduler.has_work or self.core.has_steps_in_flight:
            self.core.step()

    def drain(self) -> None:
        """End every row."""
        for handle in self.tokens:
            self.scheduler.cancel((0, handle))
        self.run()

    def _read(self, output: StepOutput) -> None:
        for handle, token in zip(output.handles.tolist(), output.tokens.tolist(), strict=True):
            self.tokens[handle].append(token)

    def _fail(self, failure: BaseException) -> None:
        raise failure
