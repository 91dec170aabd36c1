"""Every benchmark, one after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import pkgutil
import subprocess
import sys

import loadtest.bench


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench all", description=__doc__)
    parser.parse_args(argv)
    names = sorted(found.name for found in pkgutil.iter_modules(loadtest.bench.__path__))
    failed = []
    for name in names:
        if name.startswith("_") or name == "all":
            continue
        print(f"\n=== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "serving.cli", "bench", name], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)
