"""Fetching a model folder from the Hugging Face hub, or from its local cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from models.store.errors import StoreError
from models.store.folder import check_folder

PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
"""Nothing else is fetched: no pickles, no code."""


def fetch(repository: str, revision: str | None, folder: Path) -> None:
    """Fill the empty `folder` with the repository's model files.

    Blobs already in the hub's cache are linked, or copied when the cache is on another file system. Raises
    StoreError when the hub refuses, cannot be reached and the cache holds no copy, or the files are unsafe.
    """
    import huggingface_hub
    from huggingface_hub import errors

    cache = huggingface_hub.constants.HF_HUB_CACHE
    name = repository if revision is None else f"{repository}@{revision}"
    try:
        snapshot = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError:
        raise StoreError(f"{name}: the hub wants you to accept this model's terms and log in (hf auth login)") from None
    except errors.LocalEntryNotFoundError:
        raise StoreError(
            f"{name}: the hub cannot be reached and its cache {cache} holds no copy; copy the model into that cache, "
            "or give the path of a local folder"
        ) from None
    except errors.RevisionNotFoundError:
        raise StoreError(f"{name}: the hub has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise StoreError(f"{name}: the hub has no such model, or it is private and you are not logged in") from None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        summary = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise StoreError(f"{name}: the hub cannot be read: {summary[0]}") from None
    check_folder(snapshot)
    for path in snapshot.iterdir():
        if path.name in PATTERNS or (path.name.startswith("model-") and path.suffix == ".safetensors"):
            _take(path.resolve(), folder / path.name)


def _take(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
