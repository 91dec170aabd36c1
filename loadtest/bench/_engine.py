"""An engine of one rank, driven in this thread: what is measured is the engine, not its front."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from serving.block_hash import root_hash
from serving.config import EngineSettings
from serving.engine.core import EngineCore
from serving.engine.executor import LocalExecutor
from serving.engine.request import Request
from serving.engine.scheduler import Scheduler
from serving.engine.worker import Worker
from serving.planning.roofline import Shape
from serving.types import SamplingParams


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="as for argosy serve")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=None)


def load_worker(options: argparse.Namespace, *, max_num_seqs: int, max_model_len: int, budget: int) -> Worker:
    """The model behind the options, pulled first if need be."""
    from models.store import pull
    from serving import config

    found = config.load({"model": options.model})
    folder = pull(found.model, store=Path(found.store))
    return Worker(
        EngineSettings(
            model_dir=str(folder),
            served_model_name="bench",
            dtype=options.dtype,
            num_threads=options.threads,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            enable_prefix_cache=False,
        )
    )


def shape_of(worker: Worker) -> Shape:
    config = worker.config
    head = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else head
    weight_bytes = 2.0 if worker.settings.dtype == "bfloat16" else 4.0
    return Shape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        body_parameters=worker.model.num_parameters - head - embedding,
        head_parameters=head,
        weight_bytes=weight_bytes,
        kv_bytes=weight_bytes,
    )


class Bench:
    """Scheduler and step loop over a loaded worker, without threads."""

    def __init__(self, worker: Worker, budget: int) -> None:
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
            self.scheduler, LocalExecutor(worker), on_output=lambda output: None, on_failure=lambda failure: None
        )
        self._vocab = worker.model.logits_size

    def add(self, handle: int, prompt_len: int, max_tokens: int) -> None:
        """A greedy row of random tokens that ignores the end of sequence."""
        prompt = np.random.default_rng(handle).integers(10, self._vocab - 10, prompt_len)
        self.scheduler.add(
            Request(
                key=(0, handle),
                tokens=prompt.astype(np.int32),
                num_prompt=prompt_len,
                max_total=prompt_len + max_tokens,
                sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
                stop_ids=(),
                priority=0,
                root=root_hash("bench", "", b""),
            )
        )
