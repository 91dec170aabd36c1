"""A model folder in Hugging Face layout (C12): whether it is safe to load, and which of its files make it up."""

from __future__ import annotations

import re
from pathlib import Path

from models.store.errors import StoreError
from models.store.files import read_json, take
from models.store.safetensors_file import check_header
from models.store.vocabulary import VOCABULARY, needs_tokenizer, write_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
MAX_SHARDS = 4096
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX,
)
"""What a model consists of, with its weights. Nothing else is fetched or copied: no pickles, no code."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}\.safetensors")


def check_folder(folder: Path, *, is_source: bool = False) -> None:
    """Raises StoreError, with the reason and the way out, unless the engine may load `folder`.

    Wanted: config.json, tokenizer.json, safetensors weights (whole or sharded) with sound headers. Refused:
    weights in pickle formats, remote code, links out of the folder. Files that nobody loads are not looked at.
    is_source: the folder will be copied, so a vocabulary that `copy_model` converts does as well.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: not a folder")
    check_description(folder, is_source=is_source)
    _check_weights(folder)


def check_description(folder: Path, *, is_source: bool = False) -> None:
    """As `check_folder`, but for all that is not weights: what can be refused before they are fetched."""
    for path in folder.iterdir():
        if path.is_symlink():
            _check_link(folder, path)
    for name in ("config.json", "tokenizer_config.json"):
        if name != "config.json" and not (folder / name).exists():
            continue
        if "auto_map" in read_json(folder / name):
            raise StoreError(
                f"{folder.name}/{name} asks for code of its own ('auto_map'), which is never run; "
                "use a model whose architecture is supported and whose folder carries no code"
            )
    model_type = read_json(folder / "config.json").get("model_type")
    if not isinstance(model_type, str) or not model_type.isidentifier():
        raise StoreError(f"{folder.name}/config.json has no usable 'model_type' (it is {model_type!r})")
    if not (folder / "tokenizer.json").is_file() and not (is_source and needs_tokenizer(folder)):
        instead = " (a tokenizer.model is not read)" if (folder / "tokenizer.model").exists() else ""
        raise StoreError(
            f"{folder.name}/tokenizer.json is missing{instead}; load the tokenizer with transformers' AutoTokenizer "
            "and save it into the folder with save_pretrained()"
        )


def weight_names(folder: Path) -> list[str]:
    """The files that hold the weights, by the index if there is one.

    Raises StoreError for an index that is none, or that names anything but safetensors files beside it.
    """
    return sorted(_read_index(folder)) if (folder / INDEX).exists() else [WEIGHTS]


def copy_model(source: Path, target: Path) -> dict[str, str]:
    """Fill the empty `target` with FILES and the weights, with the tokenizer converted where needed.

    source: checked by `check_folder(source, is_source=True)`. Weights are linked where possible, for nobody writes
    them; the rest is copied: whoever edits a file in the store must not edit its source. Returns {file name: name of
    the file that it is a link to} of the links (a hub's cache names blobs by their content).
    """
    links: dict[str, str] = {}
    weights = weight_names(source)
    for path in [*(source / name for name in FILES), *(source / name for name in weights)]:
        if not path.exists():
            continue
        origin = path.resolve()
        if path.is_symlink():
            links[path.name] = origin.name
        take(origin, target / path.name, may_link=path.name in weights)
    if needs_tokenizer(source):
        write_tokenizer({name: source / name for name in VOCABULARY}, target)
    return links


def _check_weights(folder: Path) -> None:
    if (folder / INDEX).exists():
        _check_shards(folder)
    elif (folder / WEIGHTS).is_file():
        check_header(folder / WEIGHTS)
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise StoreError(
                f"{folder.name}: the weights are in {pickles[0]!r}, a pickle, which can run code and is never "
                "loaded; save the model again with safe_serialization=True"
            )
        raise StoreError(
            f"{folder.name}: there is neither {WEIGHTS} nor {INDEX} (weights in other formats are not read: save the "
            "model again with safe_serialization=True)"
        )


def _check_shards(folder: Path) -> None:
    for shard, tensors in sorted(_read_index(folder).items()):
        if not (folder / shard).is_file():
            raise StoreError(f"{folder.name}: the shard {shard!r} is missing; fetch it again")
        different = tensors ^ set(check_header(folder / shard))
        if different:
            raise StoreError(f"{folder.name}: {INDEX} and {shard!r} disagree about {min(different)!r}")


def _read_index(folder: Path) -> dict[str, set[str]]:
    """{shard: tensors}"""
    weight_map = read_json(folder / INDEX, is_strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StoreError(f"{folder.name}/{INDEX} has no 'weight_map'")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise StoreError(f"{folder.name}/{INDEX} puts {tensor!r} into {shard!r}, not a safetensors file beside it")
        shards.setdefault(shard, set()).add(tensor)
    if len(shards) > MAX_SHARDS:
        raise StoreError(f"{folder.name}/{INDEX} names {len(shards)} shards; at most {MAX_SHARDS} are allowed")
    return shards


def _check_link(folder: Path, path: Path) -> None:
    """A link may point into the folder, or, in a hub cache (snapshots/<revision>/), at that repository's blobs."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        raise StoreError(f"{folder.name}/{path.name} is a link that leads nowhere") from None
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise StoreError(f"{folder.name}/{path.name} is a link out of the folder; put the file itself there")
