"""One GGUF file into one model folder in the runtime format (C12)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.store import gguf_llama
from models.store.errors import StoreError
from models.store.files import write_synced
from models.store.folder import WEIGHTS
from models.store.gguf_file import read_gguf
from models.store.gguf_tokenizer import tokenizer_files
from models.store.safetensors_file import write_bfloat16

ARCHITECTURES = {"llama": gguf_llama}


def convert_gguf(source: Path, folder: Path, progress: Callable[[int, int], None]) -> dict[str, str]:
    """Write config, generation config, tokenizer, chat template and bf16 weights into the empty `folder`.

    Returns the sha256 of the files that were hashed on the way. progress: (bytes written, bytes in all).
    Raises StoreError naming the metadata or tensor that cannot be converted.
    """
    file = read_gguf(source)
    name = file.require("general.architecture", str)
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise StoreError(f"{source.name}: the architecture {name!r} is not supported ({', '.join(ARCHITECTURES)} is)")
    config = architecture.config(file)
    entries = architecture.tensors(file, config)
    files = tokenizer_files(file)
    files["config.json"] = config
    files["generation_config.json"] = _generation_config(config)
    for filename, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_synced(folder / filename, text.encode())
    return {WEIGHTS: write_bfloat16(folder / WEIGHTS, entries, progress)}


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
