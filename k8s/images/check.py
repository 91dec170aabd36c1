"""`python -m k8s.images.check gateway | engine`: builds an image's file tree and starts it as its pod would.

Without a container engine: the Dockerfile's steps are followed in a mount namespace (k8s/images/recipe.py), then the
root is made read-only, only /tmp can be written, and the pod's own command runs as user 10001 with the image's
environment alone. `gateway` asks a gateway's probes. `engine` rehearses dev-cpu on one machine: a Ray head, the weights
fetched by the pod's script, a worker, Serve given the rendered document by HTTP as KubeRay gives it, a gateway out of
the other image, a completion, and SIGTERM to the worker in the middle of a stream (k8s/images/rehearsal.py).

Needs root, overlayfs and a package index. Exit codes: 0 it works, 1 it does not, 2 it cannot be tried here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from k8s.images.containers import ROOT, Failed, Image, wait_for
from k8s.images.recipe import RecipeError
from k8s.images.rehearsal import GATEWAY_PORT, gateway_pod, rehearse

INSIDE: Final = "--inside"


def check_gateway(image: Image, log: Path) -> None:
    image.check_confinement()
    for module in ("torch", "ray", "models", "pip"):
        program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is not None)"
        image.run(["python", "-P", "-c", program])  # without the folder /models of pods that mount one
    words = gateway_pod(image)
    with image.running(words, {"ARGOSY_PORT": str(GATEWAY_PORT)}, log) as process:
        wait_for(GATEWAY_PORT, "/livez", 200, process)
        cause = wait_for(GATEWAY_PORT, "/readyz", 503, process)
        process.terminate()
        if process.wait(30) != 0:
            raise Failed(f"exit code {process.returncode} after SIGTERM")
    print(f"gateway: lives, is not ready without a cluster ({cause.strip()[:100]}), ends with 0", flush=True)


def pip_settings() -> dict[str, str]:
    """Where this machine's pip looks beside the index, as build arguments."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    found = dict(re.findall(r"^\S*\.(find-links|extra-index-url)='(.*)'$", shown.stdout, re.MULTILINE))
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in found.items()}


def inside(kind: str) -> int:
    """In a mount namespace of our own."""
    scratch = Path(tempfile.mkdtemp(prefix="argosy-image-", dir="/tmp"))
    try:
        gateway = Image("gateway", scratch, {"EXTRA": "gateway"})
        if kind == "gateway":
            check_gateway(gateway, scratch / "gateway.log")
        else:
            engine = Image("engine", scratch, {"VARIANT": "cpu", **pip_settings()})
            engine.check_confinement()
            rehearse(engine, gateway, scratch)
    except (RecipeError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", *scratch.glob("*/*-root")], capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def why_not() -> str:
    """Why this machine cannot try it; "" when it can."""
    if os.geteuid() != 0:
        return "not root: no mount namespace, no user 10001"
    for program in ("unshare", "mount", "chroot", "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        script = (
            f"cd {folder} && mkdir u w m && mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w m && umount m"
        )
        tried = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=30)
    return tried.stderr.strip() if tried.returncode else ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.images.check", description=__doc__.partition("\n")[0])
    parser.add_argument("image", choices=("gateway", "engine"))
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.inside:
        return inside(asked.image)
    if reason := why_not():
        print(f"cannot be tried here: {reason}", file=sys.stderr)
        return 2
    ours = [
        "unshare",
        "--mount",
        "--propagation=private",
        sys.executable,
        "-m",
        "k8s.images.check",
        asked.image,
        INSIDE,
    ]
    return subprocess.run(ours, cwd=ROOT, timeout=3600).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
