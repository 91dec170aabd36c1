"""One rank: its share of the model, its KV blocks and the runner. Loading happens here (C11)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from models.config import ModelError
from models.kv_cache import KVCache, bytes_per_block
from models.ops.select import select_kernels, set_num_threads
from models.parallel import Group, Stages
from models.platform import device_facts
from models.registry import CausalLM, load_config, load_model, weights_fingerprint
from models.transports.connect import Ranks
from serving.config import EngineSettings
from serving.engine.device_sampler import METHOD as DEVICE_METHOD
from serving.engine.request import Int32Array
from serving.engine.runner import ModelRunner, StepHandle, StepResult
from serving.engine.sampling_rows import SamplingRows
from serving.errors import ModelLoadError

log = logging.getLogger(__name__)

ENGINE_VERSION = 1
"""Raised whenever the engine's arithmetic changes: part of the fingerprint (C4)."""

_SAMPLING_METHOD = "splitmix64-inverse-cdf"
_DEFAULT_KV_FRACTION = 0.25
_MAX_DEFAULT_KV_BYTES = 2 << 30
_DEFAULT_DEVICE_KV_FRACTION = 0.85
"""On a GPU, of what the weights leave: activations, graphs and the libraries' own buffers take from the rest."""

PhaseCallback = Callable[[str, float], None]
LoadCallback = Callable[[int, int, float], None]
"""Told (bytes read, bytes in all, seconds since the loading began)."""

LOAD_REPORT_S = 0.5


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
    """Loads and runs one rank. Rank 0 of a replica runs it in its step loop's thread."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        ranks: Ranks | None = None,
        num_neighbours: int = 1,
        on_phase: PhaseCallback | None = None,
        on_load: LoadCallback | None = None,
    ) -> None:
        """Load this rank's share of the model.

        ranks: the rest of the gang; `allocate` must follow when all have agreed. None = a single rank.
        num_neighbours: ranks of the gang on this machine, which share its cores and memory.
        on_phase(name, seconds): told of the parts of a cold start. on_load: of the weights, twice a second and at
            the end.
        Raises ModelLoadError with what to do.
        """
        self.settings = settings
        self._report = on_phase or (lambda name, seconds: None)
        self._num_neighbours = num_neighbours
        self._group = Group() if ranks is None else ranks.group
        self._stages = Stages() if ranks is None else ranks.stages
        self._links = (None, None) if ranks is None else (ranks.before, ranks.after)
        self.samples = self._stages.is_last and self._group.rank == 0
        self._num_threads = settings.num_threads or max(1, len(os.sched_getaffinity(0)) // num_neighbours)
        set_num_threads(self._num_threads)
        self._device = torch.device(settings.device)
        self._dtype = getattr(torch, settings.dtype)
        started = time.perf_counter()
        try:
            self.config = load_config(settings.model_dir)
            self.max_model_len = self._model_len(settings.max_model_len)
            self._kernels = select_kernels(self._device, self._dtype)
            # Before gigabytes are read: a context for which there is no room, and heads that the kernels do not take.
            self._num_blocks()
            self._kv_cache(num_blocks=2)
            self.model, weights = self._load_model(on_load, started)
            self.num_blocks = self._num_blocks()
        except (ModelError, ValueError) as error:
            raise ModelLoadError(str(error)) from error
        self.agreed = fingerprint_parts(settings, weights, self.model.weight_format, self._kernels.name)
        if self._samples_on_device:
            self.agreed["sampling"] = DEVICE_METHOD
        self._report("weights", time.perf_counter() - started)
        if ranks is None:
            self.allocate(self.num_blocks)

    def _load_model(self, on_load: LoadCallback | None, started: float) -> tuple[CausalLM, str]:
        """This rank's share and the fingerprint of the weights."""
        settings = self.settings
        model = load_model(
            settings.model_dir,
            dtype=self._dtype,
            quantization=settings.quantization,
            device=self._device,
            kernels=self._kernels,
            group=self._group,
            stages=self._stages,
            max_model_len=self.max_model_len,
            progress=None if on_load is None else _paced(on_load, started),
            cache_dir=Path(settings.weight_cache_dir) if settings.weight_cache_dir else None,
            on_note=log.warning,
        )
        return model, weights_fingerprint(settings.model_dir)

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache; plans may come. num_blocks: the fewest that any rank of the gang can hold."""
        settings, started = self.settings, time.perf_counter()
        kv_cache = self._kv_cache(num_blocks)
        logits_size = self.model.logits_size
        known_ids = tokenizer_size(settings.model_dir, logits_size)
        sampling = SamplingRows(settings.max_num_seqs, logits_size, known_ids, self.config.eos_token_ids)
        before, after = self._links
        self.runner = ModelRunner(
            self.model,
            kv_cache,
            sampling if self.samples else None,
            before=before,
            after=after,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=settings.block_size,
            device=self._device,
            samples_on_device=self._samples_on_device,
        )
        self._report("kv cache", time.perf_counter() - started)
        if self._samples_on_device:
            started = time.perf_counter()
            # The routing of a mixture of experts meets the host, which no graph can.
            self.runner.prepare(settings.max_num_batched_tokens, has_graphs=self.config.experts is None)
            self._report("kernels", time.perf_counter() - started)
        self.found = Found(
            fingerprint=fingerprint(self.agreed),
            max_model_len=self.max_model_len,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache.num_bytes,
            num_threads=self._num_threads,
            kernels=self._kernels.name,
            is_exact=self._kernels.is_exact,
            num_parameters=self.model.num_parameters,
            weight_bytes=self.model.weight_bytes,
        )

    def run(self, words: Int32Array) -> StepResult:
        """Execute one encoded plan."""
        return self.runner.run(words)

    @property
    def _samples_on_device(self) -> bool:
        """Not in gangs: their ranks meet on the host in every step."""
        is_alone = self._group.size == self._stages.count == 1
        return is_alone and self._device.type == "cuda" and self._kernels.name == "triton"

    def submit(self, words: Int32Array) -> StepHandle:
        """Begin an encoded plan; on a GPU the next may be begun before its result is there."""
        return self.runner.submit(words)

    def _kv_cache(self, num_blocks: int) -> KVCache:
        return KVCache(
            self.config, self._kernels, num_blocks, self.settings.block_size, self._dtype, self._stages, self._group
        )

    def _model_len(self, asked: int | None) -> int:
        limit = self.config.max_position_embeddings
        if asked is None:
            return limit
        if asked > limit:
            raise ModelLoadError(f"max_model_len {asked} exceeds the model's {limit} positions; lower --max-model-len")
        return asked

    def _num_blocks(self) -> int:
        """Blocks that fit into kv_cache_bytes; by default what all rows could use, in bounds."""
        settings = self.settings
        block_bytes = bytes_per_block(self.config, self._dtype, settings.block_size, self._stages, self._group)
        blocks_per_row = -(-self.max_model_len // settings.block_size)
        wanted = settings.kv_cache_bytes
        if wanted is None:
            free = device_facts(self._device).free_memory_bytes
            if self._device.type == "cuda":
                allowed = int(free * _DEFAULT_DEVICE_KV_FRACTION)
            else:
                allowed = min(int(free * _DEFAULT_KV_FRACTION) // self._num_neighbours, _MAX_DEFAULT_KV_BYTES)
            wanted = min(settings.max_num_seqs * blocks_per_row * block_bytes, allowed)
        num_blocks = wanted // block_bytes
        if num_blocks < blocks_per_row:
            raise ModelLoadError(
                f"the KV cache of {wanted:,} bytes holds {num_blocks * settings.block_size} tokens, fewer than one "
                f"request of {self.max_model_len}: lower --max-model-len to {num_blocks * settings.block_size} "
                f"or raise --kv-cache-bytes to {blocks_per_row * block_bytes:,}"
            )
        return num_blocks + 1  # the sink


def _paced(on_load: LoadCallback, started: float) -> Callable[[int, int], None]:
    """`load_model`'s progress, every LOAD_REPORT_S and at the end."""
    last = started

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= LOAD_REPORT_S or done_bytes >= total_bytes:
            last = now
            on_load(done_bytes, total_bytes, now - started)

    return progress


def tokenizer_size(model_dir: str, logits_size: int) -> int:
    """One more than the highest id of the tokenizer; the model may have padded rows beyond it.

    Raises ModelLoadError when the file is none, or has no tokens.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(model_dir)
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # the library raises nothing narrower
        raise ModelLoadError(f"{path.name} is not a tokenizer that this build can read: {error}") from error
    if not ids:
        raise ModelLoadError(f"{path.name} has no tokens")
    return min(logits_size, max(ids) + 1)  # not the number of entries: ids may have gaps


def _tokenizer_file(model_dir: str) -> Path:
    path = Path(model_dir) / "tokenizer.json"
    if not path.exists():
        raise ModelLoadError(f"{path.name} is missing in the model folder: run `argosy pull` on the original model")
    return path


def fingerprint_parts(settings: EngineSettings, weights: str, weight_format: str, kernels: str) -> dict[str, str]:
    """Whatever may change a bit of the output, by name (C4). Every rank of a gang has the same.

    Not in it, because tests show independence: thread count, batch limits, chunk sizes, and what moves
    tensors among the ranks.
    """
    return {
        "weights": weights,
        "tokenizer": hashlib.sha256(_tokenizer_file(settings.model_dir).read_bytes()).hexdigest(),
        "dtype": settings.dtype,
        "weight format": weight_format,
        "ranks": f"tp{settings.tensor_parallel_size}pp{settings.pipeline_parallel_size}",
        "engine": f"engine{ENGINE_VERSION}",
        "sampling": _SAMPLING_METHOD,
        "kernels": kernels,
        "torch": str(torch.__version__),
        "numpy": f"numpy{np.__version__}",  # its exponentials enter sampling, and differ by version and ISA level
        "device": f"{settings.device}-{platform.machine()}-{device_facts(settings.device).isa}",
    }


def fingerprint(parts: Mapping[str, str]) -> str:
    """The resume domain (C4)."""
    return hashlib.sha256("\0".join(parts.values()).encode()).hexdigest()[:32]
