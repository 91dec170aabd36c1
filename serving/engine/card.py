"""What a replica tells gateways about itself and the files they need to agree with it (C23)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from serving.config import EngineSettings
from serving.engine.worker import Worker, tokenizer_size
from serving.types import ModelCard

ASSET_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Of the model folder, as far as they are there."""


def build_card(settings: EngineSettings, worker: Worker) -> ModelCard:
    """The card of a loaded worker. Equal on every replica of the same model and settings."""
    folder, found, config = Path(settings.model_dir), worker.found, worker.config
    return ModelCard(
        fingerprint=found.fingerprint,
        model=settings.served_model_name,
        max_model_len=found.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        logits_size=worker.model.logits_size,
        tokenizer_size=tokenizer_size(settings.model_dir, worker.model.logits_size),
        eos_ids=tuple(config.eos_token_ids),
        bos_id=config.bos_token_id,
        block_size=settings.block_size,
        determinism="exact" if found.is_exact else "approximate",
        assets={
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ASSET_FILES
            if (folder / name).is_file()
        },
        created=int((folder / "config.json").stat().st_mtime),
        dtype=settings.dtype,
    )


def read_asset(model_dir: str, name: str) -> bytes:
    """Content of an asset that the card names."""
    if name not in ASSET_FILES:
        raise ValueError(f"{name!r} is not an asset")
    return (Path(model_dir) / name).read_bytes()
