"""The names of a GGUF model's files when it is split, as `llama-gguf-split` gives them."""

from __future__ import annotations

import re
from pathlib import Path

MAX_PARTS = 999
_FIRST = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")


def part_paths(first: Path) -> list[Path]:
    """The files of a model whose first file is `first`: itself, or as many as its name says."""
    match = _FIRST.fullmatch(first.name)
    if match is None or int(match[2]) > MAX_PARTS:
        return [first]
    count = int(match[2])
    return [first.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
