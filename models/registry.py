"""From a model folder to a model that computes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from models.architectures.gemma3_text import Gemma3ForCausalLM
from models.architectures.gpt2 import GPT2LMHeadModel
from models.architectures.gpt_neox import GPTNeoXForCausalLM
from models.architectures.llama import LlamaForCausalLM
from models.architectures.mistral import MistralForCausalLM
from models.architectures.mixtral import MixtralForCausalLM
from models.architectures.opt import OPTForCausalLM
from models.architectures.qwen2 import Qwen2ForCausalLM
from models.architectures.qwen3 import Qwen3ForCausalLM
from models.architectures.qwen3_moe import Qwen3MoeForCausalLM
from models.batch import Batch
from models.checkpoint import Checkpoint
from models.config import ModelConfig, ModelError
from models.decoder import Decoder
from models.fields import Fields, read_fields, shown
from models.kv_cache import KVCache
from models.layers.loader import Loader
from models.ops.codes import ROUNDING_VERSION
from models.ops.kernels import Kernels
from models.ops.select import select_kernels
from models.packed_cache import PackedCache, layout_of
from models.parallel import Group, Stages
from models.quant.int4 import Int4
from models.quant.int8 import Int8
from models.quant.method import LinearMethod
from models.quant.packer import Packer
from models.quant.unquantized import Unquantized
from models.store.errors import StoreError
from models.store.manifest import MANIFEST, FileEntry, read_manifest
from models.weight_files import weight_files
from models.weight_reader import Progress, WeightReader

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

ARCHITECTURES: dict[str, type[Decoder]] = {
    "gemma3_text": Gemma3ForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "gpt_neox": GPTNeoXForCausalLM,
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "mixtral": MixtralForCausalLM,
    "opt": OPTForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}
"""By Hugging Face `model_type`, which is also the name of the architecture's file."""

_ADVICE = {"gemma3": "it also reads images; a text-only export of it says gemma3_text"}

LINEAR_METHODS: dict[str, Callable[[Kernels, torch.dtype, Packer], LinearMethod]] = {
    "none": Unquantized,
    "int8": Int8,
    "int4": Int4,
}
"""By the name that `quantization` gives them."""

QUANT_METHODS = ("argosy-int4",)
"""`quant_method` of the folders that we load; `argosy pull` writes them."""

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64


class CausalLM(Protocol):
    """A decoder that predicts the next token: one rank's share of it."""

    config: ModelConfig
    kernels: Kernels
    stages: Stages
    weight_dtype: torch.dtype
    weight_format: str  # name of the linear method; part of the fingerprint
    logits_size: int
    num_parameters: int  # of this pipeline stage, all tensor-parallel ranks together
    weight_bytes: int  # that this rank reads in one decode step: linears, head and norms

    def forward(self, batch: Batch, kv_cache: KVCache, hidden_in: torch.Tensor | None = None) -> torch.Tensor:
        """float32 logits [S, logits_size], or the residual stream [T, hidden] before the last stage."""
        ...


def load_config(folder: Path | str) -> ModelConfig:
    """The configuration of a model folder. Raises ModelError naming what is missing, wrong or not supported."""
    return parse_config(read_fields(Path(folder)))


def parse_config(fields: Fields) -> ModelConfig:
    """A `config.json` as its architecture reads it. Raises ModelError as `load_config`."""
    method = fields.values.get("quantization_config")
    if method and (not isinstance(method, dict) or method.get("quant_method") not in QUANT_METHODS):
        raise ModelError(
            f"{fields.where}quantization_config is not supported unless quant_method is one of "
            f"{', '.join(QUANT_METHODS)}; convert the model with `argosy pull`"
        )
    return _architecture(fields.text("model_type")).parse(fields)


def _architecture(model_type: str) -> type[Decoder]:
    found = ARCHITECTURES.get(model_type)
    if found is None:
        advice = f" ({_ADVICE[model_type]})" if model_type in _ADVICE else ""
        raise ModelError(f"model_type {shown(model_type)} is not one of {', '.join(sorted(ARCHITECTURES))}{advice}")
    return found


def run_in_background(work: Callable[[], object]) -> None:
    """In a thread that does not keep the process alive."""
    threading.Thread(target=work, name="save packed weights", daemon=True).start()


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    quantization: str = "auto",
    device: torch.device | str = "cpu",
    kernels: Kernels | None = None,
    group: Group | None = None,
    stages: Stages | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
    on_note: Callable[[str], None] | None = None,
    run_later: Callable[[Callable[[], object]], None] = run_in_background,
) -> CausalLM:
    """Load this rank's share of a model folder in Hugging Face layout (C12).

    dtype: of the weights; a name or a torch type among DTYPES.
    quantization: of linear weights; "auto" = as the folder stores them, or one of LINEAR_METHODS.
    kernels: None = the fastest exact set for the device and type.
    max_model_len: positions to be served; None = all that the model was trained for.
    progress: told (bytes read, bytes that this rank reads in all).
    cache_dir: where packed weights are kept for the next start; None = nowhere. on_note: told why they are not.
    run_later: given the writing of that cache, which may take minutes.
    Raises ModelError naming what is missing, wrong or not supported.
    """
    device, weight_type = torch.device(device), _weight_type(dtype)
    kernels = kernels or select_kernels(device, weight_type)
    fields = read_fields(Path(folder))
    config, quantization = parse_config(fields), _linear_method(fields, quantization)
    cache = None
    if cache_dir is not None and device.type == "cpu":
        identity = _packed_identity(folder, kernels, weight_type, quantization, group or Group(), stages or Stages())
        cache = PackedCache(cache_dir, identity, on_note=on_note)
    build = functools.partial(
        build_model,
        config,
        dtype=dtype,
        quantization=quantization,
        group=group,
        stages=stages,
        max_model_len=max_model_len,
        cache=cache,
    )
    total_bytes = 0

    def bytes_read() -> int:
        return checkpoint.bytes_read + (cache.bytes_read if cache is not None else 0)

    def tell(_: int) -> None:
        if progress is not None:
            progress(bytes_read(), total_bytes)

    with Checkpoint(Path(folder), tell) as checkpoint, cache or contextlib.nullcontext():
        # Without its values first: what is missing is named, and what will be read is counted, before gigabytes are.
        build(checkpoint, device="meta")
        checkpoint.finish()
        total_bytes = bytes_read()
        checkpoint.rewind()
        if cache is not None:
            cache.rewind(tell)
        model = build(checkpoint, device=device, kernels=kernels)
    if cache is not None and cache.is_stale:
        run_later(cache.save)
    return model


def _packed_identity(
    folder: Path | str, kernels: Kernels, dtype: torch.dtype, quantization: str, group: Group, stages: Stages
) -> dict[str, object]:
    """Everything that the bytes of a rank's packed weights depend on."""
    return {
        "weights": weights_fingerprint(folder),
        "changed": _last_change(folder),
        "format": f"{dtype} {quantization} {ROUNDING_VERSION}",
        "layout": layout_of(kernels),
        "rank": f"{group.rank} of {group.size}",
        "stage": f"{stages.index} of {stages.count}",
    }


def _last_change(folder: Path | str) -> list[int]:
    """When the weights were last written, in ns by their file system.

    The fingerprint of a large file is a sample, which a few tensors edited in place may escape.
    """
    return [path.stat().st_mtime_ns for path in weight_files(Path(folder))]


def build_model(
    config: ModelConfig,
    reader: WeightReader,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    quantization: str = "none",
    device: torch.device | str = "cpu",
    kernels: Kernels | None = None,
    group: Group | None = None,
    stages: Stages | None = None,
    max_model_len: int | None = None,
    cache: PackedCache | None = None,
) -> CausalLM:
    """This rank's share of a model with the reader's values; the other arguments are `load_model`'s.

    On the meta device it has shapes and no values: nothing is allocated or read. Raises ModelError.
    """
    device, weight_type = torch.device(device), _weight_type(dtype)
    limit = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= limit:
        raise ModelError(f"max_model_len must be from 1 to the model's {limit} positions; got {max_model_len}")
    kernels = kernels or select_kernels(device, weight_type)
    with Packer(kernels, weight_type) as packer:
        method = LINEAR_METHODS[quantization](kernels, weight_type, packer)
        loader = Loader(reader, kernels, method, group or Group(), weight_type, device, cache=cache)
        return _architecture(config.model_type)(loader, config, stages or Stages(), max_model_len or limit)


def weights_fingerprint(folder: Path | str) -> str:
    """Hex digest of what the folder computes, for the replica's fingerprint (C4).

    The weights' part is taken from the hashes in the store's manifest where there is one. Other
    folders are sampled: every file's name, size, safetensors header and 64 pieces of its content.
    Raises ModelError when files are missing or not the manifest's.
    """
    folder = Path(folder)
    files = weight_files(folder)
    listed = _listed_files(folder)
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in files:
            size = path.stat().st_size
            content = _sampled_hash(path, size) if listed is None else _listed_hash(listed, path, size)
            digest.update(f"\0{path.name}\0{size}\0{content}".encode())
    except OSError as error:
        raise ModelError(f"{Path(error.filename).name} cannot be read in {folder}: {error.strerror}") from error
    return digest.hexdigest()


def _linear_method(fields: Fields, asked: str) -> str:
    """The name among LINEAR_METHODS for a folder. Raises ModelError where the folder's weights cannot be so."""
    is_stored = bool(fields.values.get("quantization_config"))
    if asked == "auto":
        return "int4" if is_stored else "none"
    if asked not in LINEAR_METHODS:
        raise ModelError(f"quantization must be one of auto, {', '.join(LINEAR_METHODS)}; got {asked!r}")
    if is_stored and asked != "int4":
        raise ModelError(
            f"{fields.where}quantization {asked!r} is not possible: the weights are stored as {QUANT_METHODS[0]}; "
            "pull the original model for it"
        )
    return asked


def _weight_type(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return found


def _listed_files(folder: Path) -> dict[str, FileEntry] | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        return read_manifest(folder).files
    except StoreError as error:
        raise ModelError(str(error)) from error


def _listed_hash(listed: dict[str, FileEntry], path: Path, size: int) -> str:
    entry = listed.get(path.name)
    if entry is None:
        raise ModelError(f"{path.name} is not listed in {MANIFEST}")
    if entry.bytes != size:
        raise ModelError(f"{path.name} has {size} bytes; {MANIFEST} says {entry.bytes}")
    return entry.sha256


def _sampled_hash(path: Path, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header_size = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_size, _MAX_HEADER_BYTES)))
        for i in range(_NUM_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
