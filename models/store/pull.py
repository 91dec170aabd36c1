"""Bringing a model into the store (C12): once, whole, verified, safely against other processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from models.store.errors import StoreError
from models.store.files import locked, sync_folder
from models.store.folder import check_folder
from models.store.manifest import MANIFEST, sha256_of, verify, write_manifest
from models.store.sources import GgufSource, HubSource, LocalFolder, PackagedGguf, StoredFolder, find_source

Progress = Callable[[str, int, int], None]
"""(phase, bytes done, bytes in all); the phase is wait, download, convert or verify; 0 in all = unknown."""


def resolve(reference: str, store: Path) -> Path:
    """The folder that `pull` returns for this reference, whether or not it is there yet.

    Raises StoreError when the reference means nothing.
    """
    match find_source(reference, store):
        case LocalFolder(path):
            return path
        case PackagedGguf():
            return store / reference
        case GgufSource(name=name) | HubSource(name=name) | StoredFolder(name=name):
            return store / name


def pull(reference: str, *, store: Path, progress: Progress | None = None) -> Path:
    """The model folder (C12) of an alias, a local folder, a GGUF file or a hub id, ready to be loaded.

    A local folder is validated and used in place. Everything else is written once to `store` and only verified
    (milliseconds) from then on; a stored folder that fails its verification is made again. Several processes may
    pull the same model: one works, the others wait. A pull that fails leaves the store as it was.
    Raises StoreError with what to do about it.
    """
    source = find_source(reference, store)
    report = progress or _silent
    if isinstance(source, LocalFolder):
        if (source.path / MANIFEST).exists():
            verify(source.path)
        check_folder(source.path)
        return source.path
    target = resolve(reference, store)
    if isinstance(source, StoredFolder):
        verify(target)
        return target
    if _is_whole(target):
        return target
    try:
        with locked(store / ".locks" / f"{target.name}.lock", lambda: report("wait", 0, 0)):
            if not _is_whole(target):  # another process may just have made it
                _make(source, target, report)
    except OSError as error:
        raise StoreError(f"the store {store} cannot be written: {error.strerror or error}") from None
    return target


def _make(source: PackagedGguf | GgufSource | HubSource, target: Path, report: Progress) -> None:
    if target.exists() and not (target / MANIFEST).exists():
        raise StoreError(f"{target} is in the way and was not made by a pull; move it away")
    with _scratch(target) as scratch:
        # Imported here: a pull of what is already there is on the path of every start.
        if isinstance(source, HubSource):
            from models.store import hub

            report("download", 0, 0)
            promised = hub.fetch(
                source.repository, source.revision, scratch, lambda done, total: report("download", done, total)
            )
            origin = f"hub:{source.repository}" + (f"@{source.revision}" if source.revision else "")
            known: dict[str, str] = {}
        else:
            path, expected, origin = _gguf(source)
            if expected is not None and sha256_of(path) != expected:
                raise StoreError(f"{path.name}: the file is damaged (its sha256 is not {expected}); install it again")
            promised = {}
            from models.store.convert import convert_gguf

            known = convert_gguf(path, scratch, lambda done, total: report("convert", done, total))
        manifest = write_manifest(scratch, origin, known)
        for name, sha256 in promised.items():
            if manifest.files[name].sha256 != sha256:
                raise StoreError(f"{name}: the copy in the hub's cache is damaged; delete it there and pull again")
        verify(scratch, deep=True, progress=lambda done, total: report("verify", done, total))
        check_folder(scratch)
        sync_folder(scratch)
        _swap(scratch, target)


def _gguf(source: PackagedGguf | GgufSource) -> tuple[Path, str | None, str]:
    """(file, expected sha256, origin for the manifest)."""
    if isinstance(source, PackagedGguf):
        return source.locate(), source.sha256, f"pypi:{source.requirement}/{source.file}"
    return source.path, source.sha256, f"gguf:{source.path}"


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty folder on the store's file system; whatever a killed pull left there goes first."""
    scratch = target.parent / ".tmp" / target.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, target: Path) -> None:
    """Move the finished folder to its place; a damaged one that is there moves out first."""
    damaged = scratch.with_name(scratch.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if target.exists():
        target.rename(damaged)
    scratch.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(damaged, ignore_errors=True)


def _is_whole(target: Path) -> bool:
    if not (target / MANIFEST).is_file():
        return False
    try:
        verify(target)
    except StoreError:
        return False
    return True


def _silent(phase: str, done: int, total: int) -> None:
    pass
