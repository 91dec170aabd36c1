"""`argosy.json`: what a folder of the store consists of, and whether it still does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.store.errors import StoreError
from models.store.files import read_json, write_synced
from models.store.safetensors_file import check_header

MANIFEST = "argosy.json"
FORMAT = 1
MAX_HASHED_BYTES = 16 << 20
"""Files up to this size are hashed even by the cheap verification: configuration and tokenizer."""

_CHUNK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str  # hex
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    source: str  # what the folder was made of, for people
    files: dict[str, FileEntry]


def write_manifest(folder: Path, source: str, known: dict[str, str]) -> Manifest:
    """Write `argosy.json` for all files of `folder`.

    known: sha256 hex of files that were hashed while they were written; the others are read.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = FileEntry(known.get(path.name) or sha256_of(path), path.stat().st_size)
    manifest = Manifest(source, files)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=2) + "\n"
    write_synced(folder / MANIFEST, text.encode())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises StoreError when there is none or it is not of our format."""
    content = read_json(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise StoreError(f"{folder.name}: {MANIFEST} has format {content.get('format')!r}, not {FORMAT}; pull again")
    files = content.get("files")
    source = content.get("source")
    if not isinstance(source, str) or not isinstance(files, dict):
        raise StoreError(f"{folder.name}: {MANIFEST} is damaged; pull again")
    return Manifest(source, {name: _entry(folder, name, entry) for name, entry in files.items()})


def verify(folder: Path, *, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Check a folder of the store against its manifest.

    Sizes, safetensors headers and the hashes of small files are always checked (milliseconds), the hashes of
    the weights only when `deep`. progress: (bytes hashed, bytes in all), only when deep.
    Raises StoreError naming the file that differs.
    """
    manifest = read_manifest(folder)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    strange = sorted(present ^ set(manifest.files))
    if strange:
        state = "missing" if strange[0] in manifest.files else "not in the manifest"
        raise StoreError(f"{folder.name}: the file {strange[0]!r} is {state}")
    total = sum(entry.bytes for entry in manifest.files.values())
    done = 0
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise StoreError(f"{folder.name}: {name!r} is not a plain file")
        size = path.stat().st_size
        if size != entry.bytes:
            raise StoreError(f"{folder.name}: {name!r} has {size} bytes, the manifest says {entry.bytes}")
        if path.suffix == ".safetensors":
            check_header(path)
        if (deep or size <= MAX_HASHED_BYTES) and sha256_of(path) != entry.sha256:
            raise StoreError(f"{folder.name}: {name!r} is damaged (its sha256 differs from the manifest's)")
        done += size
        if deep and progress is not None:
            progress(done, total)
    return manifest


def sha256_of(path: Path) -> str:
    """sha256 of a file's content in hex."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _entry(folder: Path, name: str, entry: Any) -> FileEntry:
    is_name = name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name
    sha256, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if not is_name or not isinstance(sha256, str) or type(size) is not int:
        raise StoreError(f"{folder.name}: {MANIFEST} describes {name!r} wrongly; pull again")
    return FileEntry(sha256, size)
