"""The safetensors files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from models.config import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """The safetensors files of a folder, each with the tensors that the index places in it.

    Raises ModelError when there is none, naming a pickle if that is all there is: unpickling runs
    code that its author chose.
    """
    index = folder / INDEX_FILE
    if index.exists():
        return _indexed_files(index)
    if (folder / SINGLE_FILE).exists():
        return {folder / SINGLE_FILE: frozenset()}
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES) if folder.is_dir() else []
    if pickles:
        raise ModelError(f"{pickles[0]} is a pickle and is never loaded; the model needs {SINGLE_FILE}")
    raise ModelError(f"neither {SINGLE_FILE} nor {INDEX_FILE} exists in {folder}")


def _indexed_files(index: Path) -> dict[Path, frozenset[str]]:
    size = index.stat().st_size
    if size > _MAX_INDEX_BYTES:
        raise ModelError(f"{index.name}: {size} bytes; the limit is {_MAX_INDEX_BYTES}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"].items()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} holds no weight_map of tensor to file names") from error
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index.name}: {tensor} must be in a .safetensors file of this folder; got {file!r}")
        files.setdefault(file, set()).add(tensor)
    return {index.parent / file: frozenset(names) for file, names in sorted(files.items())}
