"""`python -m k8s.images.lock`: the images' requirements, hash-locked, from the versions that pyproject.toml pins.

Needs uv. The CPU build of torch is not on PyPI: `--find-links FOLDER` or `--index URL` says where uv finds it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent.parent
FOLDER: Final = Path(__file__).parent

GATEWAY: Final = (
    "fastapi",
    "httptools",
    "httpx",
    "jinja2",
    "msgspec",
    "prometheus-client",
    "pyyaml",
    "rich",
    "tokenizers",
    "typer",
    "uvicorn",
    "uvloop",
)
"""What of our requirements a gateway imports; neither torch nor ray."""

IMAGES: Final = ("gateway", "loadtest", "engine-cpu", "engine-cuda")
HEADING: Final = "# Written by `python -m k8s.images.lock`; do not edit.\n"


def requirements(image: str) -> list[str]:
    """An image's direct requirements, as pyproject.toml pins them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ours: list[str] = project["project"]["dependencies"]
    extras: dict[str, Any] = project["project"]["optional-dependencies"]
    build: list[str] = project["build-system"]["requires"]
    if image.startswith("engine"):
        found = [*ours, *extras["k8s"], *(extras["gpu"] if image == "engine-cuda" else [])]
        if image == "engine-cpu":
            found = [f"{line}+cpu" if line.startswith("torch==") else line for line in found]
    else:
        found = [line for line in ours if name_of(line) in GATEWAY]
        found += extras["tracing"] + (extras["loadtest"] if image == "loadtest" else [])
    return sorted([*found, *build])


def name_of(requirement: str) -> str:
    """The distribution's name as indexes write it."""
    return re.split(r"[\[=<>;\s]", requirement)[0].lower().replace("_", "-")


def lock(image: str, uv: str, more: list[str]) -> str:
    """The image's lock: every distribution with its version and the hashes of its files."""
    command = [uv, "pip", "compile", "-", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", *more]
    asked = "\n".join(requirements(image))
    ran = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=600)
    if ran.returncode:
        raise SystemExit(f"{image}: {ran.stderr.strip()}")
    return HEADING + ran.stdout


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.images.lock", description=__doc__.partition("\n")[0])
    parser.add_argument("--uv", default=shutil.which("uv"), help="the program [from PATH]")
    parser.add_argument("--find-links", help="a folder with the CPU build of torch")
    parser.add_argument("--index", help="an index with the CPU build of torch")
    asked = parser.parse_args(arguments)
    if asked.uv is None:
        print("error: uv is not installed; `pip install uv`, or name it with --uv", file=sys.stderr)
        return 2
    for image in IMAGES:
        more = []
        if image == "engine-cpu":
            more += ["--find-links", asked.find_links] if asked.find_links else []
            more += ["--index", asked.index] if asked.index else []
        (FOLDER / f"requirements-{image}.txt").write_text(lock(image, asked.uv, more), encoding="utf-8")
        print(f"k8s/images/requirements-{image}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
