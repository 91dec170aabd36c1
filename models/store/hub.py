"""Fetching a model folder from the Hugging Face hub, or from its local cache."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.store.errors import StoreError
from models.store.folder import FILES, check_description, check_folder, copy_model, weight_names
from models.store.vocabulary import VOCABULARY

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(
    repository: str, revision: str | None, folder: Path, progress: Callable[[int, int], None]
) -> tuple[str, dict[str, str]]:
    """Fill the empty `folder` with the repository's model files.

    The hub's own cache is used; weights are linked to its blobs, or copied when it is on another file system.
    progress: (bytes there, bytes in all as far as known). Returns the commit that was fetched, and the sha256 (hex)
    that the hub gave for files, as far as it did. Raises StoreError when the hub refuses, cannot be reached and the
    cache holds no copy, or the files are unsafe.
    """
    snapshot = _download(repository, revision, FILES, progress)
    if not (snapshot / "tokenizer.json").exists():
        snapshot = _download(repository, snapshot.name, VOCABULARY, progress)
    check_description(snapshot, is_source=True)
    snapshot = _download(repository, snapshot.name, weight_names(snapshot), progress)
    check_folder(snapshot, is_source=True)
    links = copy_model(snapshot, folder)
    # The cache names large files by their content.
    return snapshot.name, {name: blob for name, blob in links.items() if _SHA256.fullmatch(blob)}


def _download(
    repository: str, revision: str | None, patterns: Sequence[str], progress: Callable[[int, int], None]
) -> Path:
    """The cached snapshot, a folder named by its commit."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    cache = constants.HF_HUB_CACHE
    name = repository if revision is None else f"{repository}@{revision}"
    try:
        downloaded = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), tqdm_class=_bar(progress)
        )
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
    except Exception as error:  # whatever the library's HTTP client, cache and parsers raise
        summary = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise StoreError(f"{name}: the hub cannot be read: {summary[0]}") from None
    return Path(downloaded)


def _bar(progress: Callable[[int, int], None]) -> type[Any]:
    """The library reports through the class of its progress bars: one that draws nothing."""
    from huggingface_hub import utils

    tqdm: Any = utils.tqdm  # type: ignore[attr-defined]  # re-exported without saying so

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_files = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self._counts_files:
                progress(int(self.n), int(self.total or 0))
            return drawn

    return Bar
