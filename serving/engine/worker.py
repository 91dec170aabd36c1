"""One rank: its share of the model, its KV blocks and the runner. Loading happens here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.config import ModelError
from models.kv_cache import KVCache, bytes_per_block
from models.ops.select import select_kernels, set_num_threads
from models.platform import device_facts
from models.registry import CausalLM, load_config, load_model, weights_fingerprint
from serving.config import EngineSettings
from serving.engine.request import Int32Array
from serving.engine.runner import ModelRunner, StepResult
from serving.engine.sampling_rows import SamplingRows
from serving.errors import ModelLoadError

ENGINE_VERSION = 1
"""Raised whenever the engine's arithmetic changes: part of the fingerprint (C4)."""

_SAMPLING_METHOD = "splitmix64-inverse-cdf"
_DEFAULT_KV_FRACTION = 0.25
_MAX_DEFAULT_KV_BYTES = 2 << 30

PhaseCallback = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """Facts learnt at start (C16)."""

    fingerprint: str
    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    num_threads: int
    kernels: str
    is_exact: bool
    num_parameters: int
    weight_bytes: int


class Worker:
    """Loads and runs one rank. A replica of one rank runs it in its step loop's thread."""

    def __init__(self, settings: EngineSettings, *, on_phase: PhaseCallback | None = None) -> None:
        """Load the model. `on_phase(name, seconds)` reports the parts of a cold start.

        Raises ModelLoadError with what to do.
        """
        self.settings = settings
        report = on_phase or (lambda name, seconds: None)
        num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        set_num_threads(num_threads)
        device = torch.device(settings.device)
        dtype = getattr(torch, settings.dtype)
        started = time.perf_counter()
        try:
            self.config = load_config(settings.model_dir)
            self.max_model_len = self._model_len(settings.max_model_len)
            kernels = select_kernels(device, dtype)
            self.model: CausalLM = load_model(
                settings.model_dir, dtype=dtype, device=device, kernels=kernels, max_model_len=self.max_model_len
            )
            weights = weights_fingerprint(settings.model_dir)
        except (ModelError, ValueError) as error:
            raise ModelLoadError(str(error)) from error
        report("weights", time.perf_counter() - started)
        started = time.perf_counter()
        num_blocks = self._num_blocks(dtype)
        kv_cache = KVCache(self.config, kernels, num_blocks, settings.block_size, dtype)
        sampling = SamplingRows(
            settings.max_num_seqs,
            self.model.logits_size,
            tokenizer_size(settings.model_dir, self.model.logits_size),
            self.config.eos_token_ids,
            device=settings.device,
        )
        self.runner = ModelRunner(
            self.model,
            kv_cache,
            sampling,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=settings.block_size,
            device=device,
        )
        report("kv cache", time.perf_counter() - started)
        self.found = Found(
            fingerprint=fingerprint(weights, settings, kernels.name),
            max_model_len=self.max_model_len,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache.num_bytes,
            num_threads=num_threads,
            kernels=kernels.name,
            is_exact=kernels.is_exact,
            num_parameters=self.model.num_parameters,
            weight_bytes=self.model.weight_bytes,
        )

    def run(self, words: Int32Array) -> StepResult:
        """Execute one encoded plan."""
        return self.runner.run(words)

    def _model_len(self, asked: int | None) -> int:
        limit = self.config.max_position_embeddings
        if asked is None:
            return limit
        if asked > limit:
            raise ModelLoadError(f"max_model_len {asked} exceeds the model's {limit} positions; lower --max-model-len")
        return asked

    def _num_blocks(self, dtype: torch.dtype) -> int:
        """Blocks that fit into kv_cache_bytes; by default what all rows could use, in bounds."""
        settings = self.settings
        block_bytes = bytes_per_block(self.config, dtype, settings.block_size)
        blocks_per_row = -(-self.max_model_len // settings.block_size)
        wanted = settings.kv_cache_bytes
        if wanted is None:
            free = int(device_facts(settings.device).free_memory_bytes * _DEFAULT_KV_FRACTION)
            wanted = min(settings.max_num_seqs * blocks_per_row * block_bytes, free, _MAX_DEFAULT_KV_BYTES)
        num_blocks = wanted // block_bytes
        if num_blocks < blocks_per_row:
            raise ModelLoadError(
                f"the KV cache of {wanted:,} bytes holds {num_blocks * settings.block_size} tokens, fewer than one "
                f"request of {self.max_model_len}: lower --max-model-len to {num_blocks * settings.block_size} "
                f"or raise --kv-cache-bytes to {blocks_per_row * block_bytes:,}"
            )
        return num_blocks + 1  # the sink


def tokenizer_size(model_dir: str, logits_size: int) -> int:
    """One more than the highest id of the tokenizer; the model may have padded rows beyond it."""
    from tokenizers import Tokenizer

    path = Path(model_dir) / "tokenizer.json"
    if not path.exists():
        raise ModelLoadError(f"{path.name} is missing in the model folder: run `argosy pull` on the original model")
    ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    return min(logits_size, max(ids) + 1)  # not the number of entries: ids may have gaps


def fingerprint(weights: str, settings: EngineSettings, kernels: str) -> str:
    """The resume domain (C4): whatever may change a bit of the output is in it.

    Not in it, because tests show independence: thread count, batch limits, chunk sizes.
    """
    tokenizer = hashlib.sha256((Path(settings.model_dir) / "tokenizer.json").read_bytes()).hexdigest()
    parts = (
        weights,
        tokenizer,
        settings.dtype,
        "plain",  # weight format
        "tp1pp1",
        f"engine{ENGINE_VERSION}",
        _SAMPLING_METHOD,
        kernels,
        torch.__version__,
        f"numpy{np.__version__}",  # its exponentials enter sampling, and differ by version and ISA level
        f"{settings.device}-{platform.machine()}-{device_facts(settings.device).isa}",
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
