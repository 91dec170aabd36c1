"""Bringing a model into the store (C12): once, whole, verified, safely against other processes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from models.store.errors import StoreError
from models.store.files import locked, sync_folder
from models.store.folder import check_folder, copy_model
from models.store.manifest import MANIFEST, sha256_of, verify, write_manifest
from models.store.sources import (
    GgufSource,
    HubSource,
    LocalFolder,
    PackagedGguf,
    StoredFolder,
    find_source,
    folder_name,
)
from models.store.vocabulary import needs_tokenizer

Progress = Callable[[str, int, int], None]
"""(phase, bytes done, bytes in all); the phase is wait, download, convert or verify; 0 in all = unknown."""


INT4_SUFFIX = "-int4"
"""Ends the name in the store of a GGUF file whose 4-bit linears were kept."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Content:
    """What was put into a folder."""

    origin: str  # for the manifest
    known: dict[str, str] = dataclasses.field(default_factory=dict)  # sha256 of files hashed on the way
    promised: dict[str, str] = dataclasses.field(default_factory=dict)  # sha256 that files must have


def resolve(reference: str, store: Path, quantization: str = "auto") -> Path:
    """The folder that `pull` returns for this reference, whether or not it is there yet.

    Raises StoreError when the reference means nothing.
    """
    source = find_source(reference, store)
    match source:
        case LocalFolder(path):
            return store / folder_name(path) if needs_tokenizer(path) else path
        case HubSource(name=name):
            return store / name
        case StoredFolder(name=name):
            kept = store / f"{name}{INT4_SUFFIX}"
            return kept if quantization == "int4" and (kept / MANIFEST).is_file() else store / name
        case PackagedGguf() | GgufSource():
            return _gguf_target(source, store, quantization)


def pull(reference: str, *, store: Path, quantization: str = "auto", progress: Progress | None = None) -> Path:
    """The model folder (C12) of an alias, a local folder, a GGUF file or a hub id, ready to be loaded.

    quantization: of the linears. "int4" keeps those of a GGUF file that are in 4 bits as they are, in a folder of its
    own beside the bf16 one. Everything else is for the engine to do when it loads.

    A local folder is validated and used in place, unless its tokenizer has to be converted. Everything else is written
    once to `store` and only verified (milliseconds) from then on; a stored folder that fails its verification is made
    again. Several processes may pull the same model: one works, the others wait. A pull that fails leaves the store as
    it was. Raises StoreError with what to do about it.
    """
    source = find_source(reference, store)
    target = resolve(reference, store, quantization)
    if isinstance(source, LocalFolder) and target == source.path:
        if (target / MANIFEST).exists():
            verify(target)
        check_folder(target)
        return target
    if isinstance(source, StoredFolder):
        verify(target)
        return target
    if _is_whole(target):
        return target
    report = progress or _silent
    try:
        with locked(store / ".locks" / f"{target.name}.lock", lambda: report("wait", 0, 0)):
            if not _is_whole(target):  # another process may just have made it
                _make(source, target, report)
    except OSError as error:
        raise StoreError(f"the store {store} cannot be written: {error.strerror or error}") from None
    return target


def _gguf_target(source: PackagedGguf | GgufSource, store: Path, quantization: str) -> Path:
    """Where a GGUF file's model belongs, by what it holds."""
    kept = store / f"{source.name}{INT4_SUFFIX}"
    if quantization != "int4":
        return store / source.name
    if not (kept / MANIFEST).is_file():
        from models.store.convert import has_int4_linears

        if not has_int4_linears(source.locate()):
            return store / source.name
    return kept


def _make(source: LocalFolder | PackagedGguf | GgufSource | HubSource, target: Path, report: Progress) -> None:
    if target.exists() and not (target / MANIFEST).exists():
        raise StoreError(f"{target} is in the way and was not made by a pull; move it away")
    _sweep(target)
    with _scratch(target) as scratch:
        # What fills a folder is imported there: a pull of what is already there is on the path of every start.
        match source:
            case LocalFolder(path):
                content = _copied(path, scratch)
            case HubSource():
                content = _fetched(source, scratch, report)
            case _:
                content = _converted(source, scratch, report, keep_int4=target.name != source.name)
        manifest = write_manifest(scratch, content.origin, content.known)
        for name, sha256 in content.promised.items():
            if manifest.files[name].sha256 != sha256:
                raise StoreError(f"{name}: the copy in the hub's cache is damaged; delete it there and pull again")
        verify(scratch, deep=True, progress=lambda done, total: report("verify", done, total))
        check_folder(scratch)
        sync_folder(scratch)
        _swap(scratch, target)


def _copied(path: Path, scratch: Path) -> _Content:
    check_folder(path, is_source=True)
    copy_model(path, scratch)
    return _Content(f"folder:{path}")


def _fetched(source: HubSource, scratch: Path, report: Progress) -> _Content:
    from models.store import hub

    report("download", 0, 0)
    commit, promised = hub.fetch(
        source.repository, source.revision, scratch, lambda done, total: report("download", done, total)
    )
    return _Content(f"hub:{source.repository}@{commit}", promised=promised)


def _converted(source: PackagedGguf | GgufSource, scratch: Path, report: Progress, *, keep_int4: bool) -> _Content:
    path = source.locate()
    if source.sha256 is not None and sha256_of(path) != source.sha256:
        raise StoreError(f"{path.name}: the file is damaged (its sha256 is not {source.sha256}); install it again")
    from models.store.convert import convert_gguf

    known = convert_gguf(path, scratch, lambda done, total: report("convert", done, total), keep_int4=keep_int4)
    return _Content(source.origin, known)


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


def _sweep(target: Path) -> None:
    """Remove what killed pulls of other models have left: theirs are the folders that nobody has locked."""
    for left in (target.parent / ".tmp").glob("*"):
        if left.name != target.name:
            lock = target.parent / ".locks" / f"{left.name}.lock"
            with contextlib.suppress(StoreError), locked(lock, lambda: None, timeout_s=0):
                shutil.rmtree(left, ignore_errors=True)


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
