"""One GGUF file into one model folder in the runtime format (C12)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.store.errors import StoreError
from models.store.files import write_synced
from models.store.gguf_config import read_config
from models.store.gguf_file import GgufFile, read_gguf
from models.store.gguf_tensors import find_targets
from models.store.gguf_tokenizer import tokenizer_files
from models.store.gguf_weights import GROUP_SIZE, INT4_FORMATS, bfloat16_entry, int4_entries
from models.store.safetensors_writer import write_weights

MAX_SHARD_BYTES = 4 << 30
_ENDS = ("eos", "eot", "eom")  # of the sequence, of a turn, of a message to a tool


def has_int4_linears(source: Path) -> bool:
    """Whether linears of the file's layers are in 4 bits, so that `keep_int4` keeps something.

    Reads the header only. Raises StoreError as `convert_gguf` does.
    """
    file = read_gguf(source)
    targets = find_targets(file, *read_config(file))
    return any(target.is_linear and target.source.format in INT4_FORMATS for target in targets)


def convert_gguf(
    source: Path, folder: Path, progress: Callable[[int, int], None], *, keep_int4: bool = False
) -> dict[str, str]:
    """Write config, generation config, tokenizer, chat template and weights into the empty `folder`.

    Weights are rounded to bf16; with `keep_int4` those linears that are in 4 bits stay what they are (see
    `gguf_weights`).
    Returns the sha256 of the files that were hashed on the way. progress: (bytes written, bytes in all).
    Raises StoreError naming the metadata or tensor that cannot be converted.
    """
    file = read_gguf(source)
    config, sizes = read_config(file)
    targets = find_targets(file, config, sizes)
    files = tokenizer_files(file)
    entries = []
    for target in targets:
        if keep_int4 and target.is_linear and target.source.format in INT4_FORMATS:
            entries += int4_entries(target)
            config["quantization_config"] = {"quant_method": "argosy-int4", "group_size": GROUP_SIZE}
        else:
            entries.append(bfloat16_entry(target))
    files["config.json"] = config
    files["generation_config.json"] = _generation_config(file, config)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_synced(folder / name, text.encode())
    return write_weights(folder, entries, progress, MAX_SHARD_BYTES)


def _generation_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Special tokens. Raises StoreError for ids that the vocabulary does not have."""
    ids = {key: file.get(f"tokenizer.ggml.{key}_token_id", int) for key in ("bos", "padding", *_ENDS)}
    for key, index in ids.items():
        if index is not None and not 0 <= index < config["vocab_size"]:
            raise StoreError(
                f"{file.path.name}: {key}_token_id is {index}, but the vocabulary has {config['vocab_size']} tokens"
            )
    result = {name: ids[key] for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding"))}
    ends = list(dict.fromkeys(ids[key] for key in _ENDS if ids[key] is not None))
    result["eos_token_id"] = (ends[0] if len(ends) == 1 else ends) if ends else None
    return {name: value for name, value in result.items() if value is not None}
