"""From a reference to a configuration: a shape, a config.json, a folder, a GGUF file, the store, the hub's cache."""

from __future__ import annotations

from pathlib import Path

from models.config import ModelConfig, ModelError
from models.fields import Fields, read_fields
from models.registry import parse_config
from models.store import StoreError, resolve
from models.store.files import read_json
from models.store.gguf_config import read_config
from models.store.gguf_file import read_gguf
from models.store.sources import GgufSource, HubSource, LocalFolder, PackagedGguf, StoredFolder, find_source
from serving.config import expanded
from serving.planning.demand import PlanError
from serving.planning.shapes import SHAPES


def find_config(reference: str, store: Path) -> tuple[ModelConfig, str]:
    """(the configuration, "int4" when the checkpoint's linears are kept in 4 bits, else "none").

    Nothing is fetched and no weights are read. Raises PlanError saying what the reference could have been.
    """
    try:
        fields = _find_fields(reference, store)
        return parse_config(fields), "int4" if fields.values.get("quantization_config") else "none"
    except (ModelError, StoreError) as error:
        raise PlanError(str(error)) from error


def _find_fields(reference: str, store: Path) -> Fields:
    if reference in SHAPES:
        return Fields(SHAPES[reference], where=f"{reference}: ")
    path = expanded(reference)
    if path.suffix == ".json" and _is_file(path):
        return Fields(read_json(path), where=f"{path.name}: ")
    try:
        source = find_source(reference, store)
    except StoreError as error:
        raise PlanError(f"{error}, a config.json, or one of the shapes that `argosy plan` lists") from error
    match source:
        case LocalFolder(folder):
            return read_fields(folder)
        case StoredFolder(name=name):
            return read_fields(store / name)
        case HubSource():
            return _from_hub(source, store)
        case PackagedGguf() | GgufSource():
            stored = resolve(reference, store)
            if (stored / "config.json").is_file():
                return read_fields(stored)
            values, _ = read_config(read_gguf(source.locate()))
            return Fields(values, where=f"{source.locate().name}: ")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than any name, or with a null character
        return False


def _from_hub(source: HubSource, store: Path) -> Fields:
    if (store / source.name / "config.json").is_file():
        return read_fields(store / source.name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.repository, "config.json", revision=source.revision)
    if not isinstance(cached, str):
        raise PlanError(
            f"{source.repository} is neither in the store nor in the hub's cache, and nothing is fetched for a plan; "
            f"bring it with `argosy pull {source.repository}`, or give its config.json"
        )
    return Fields(read_json(Path(cached)), where=f"{source.repository}: ")
