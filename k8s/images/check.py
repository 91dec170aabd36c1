"""`python -m k8s.images.check gateway | engine`: builds an image's file tree and starts it as its pod would.

Without a container engine: the Dockerfile's steps are followed in a mount namespace (k8s/images/recipe.py), then the
root is made read-only, only /tmp can be written, and the pod's own command runs as user 10001 with the image's
environment alone. `gateway` asks a gateway's probes. `engine` rehearses dev-cpu on one machine: a Ray head, the weights
fetched by the pod's script, Serve given the rendered document by HTTP as KubeRay gives it, a gateway out of the other
image, a completion.

Needs root, overlayfs and a package index. Exit codes: 0 it works, 1 it does not, 2 it cannot be tried here.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from k8s import deployment, render
from k8s.images.recipe import Recipe, RecipeError, Stage, mount
from k8s.objects import AGENT_PORT, DASHBOARD_PORT, MODELS_PATH, SECRET_PATH, SETTINGS_PATH, USER, Object
from k8s.weights import MODEL_PATH

ROOT: Final = Path(__file__).parent.parent.parent
INSIDE: Final = "--inside"
SECRET: Final = "5e" * 32
TOKEN: Final = "70" * 32
START_S: Final = 180.0


class Failed(Exception):
    """What a pod did not do."""


class Image:
    """A built tree, made read-only, with what its pods mount."""

    def __init__(self, name: str, scratch: Path, build_args: dict[str, str]) -> None:
        begun = time.monotonic()
        folder = scratch / name
        folder.mkdir()
        self.stage: Stage = Recipe(ROOT / f"Dockerfile.{name}", ROOT, folder, build_args).build()
        if self.stage.user != f"{USER}:{USER}":
            raise Failed(f"the image runs as {self.stage.user}, pods as {USER}")
        size = sum(path.lstat().st_size for path in (self.stage.root / "opt/argosy").rglob("*"))
        print(f"{name}: built in {time.monotonic() - begun:.0f} s, {size / 1e6:,.0f} MB in /opt/argosy", flush=True)
        for path in (SETTINGS_PATH, SECRET_PATH, MODEL_PATH, MODELS_PATH):
            (self.stage.root / path.strip("/")).mkdir(parents=True, exist_ok=True)
        mount("-o", "remount,ro", str(self.stage.root))
        for path in ("/tmp", MODELS_PATH):
            mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(self.stage.root / path.strip("/")))

    def give(self, path: str, files: dict[str, str]) -> None:
        """Mount files as a ConfigMap or Secret is mounted."""
        folder = self.stage.root / path.strip("/")
        mount("-t", "tmpfs", "tmpfs", str(folder))
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o440)
            os.chown(folder / name, 0, USER)
        mount("-o", "remount,ro", str(folder))

    def command(self, words: list[str]) -> list[str]:
        """A process of the image, as a container engine starts it."""
        confined = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"]
        return ["chroot", str(self.stage.root), *confined, "--bounding-set=-all", *words]

    @contextlib.contextmanager
    def running(self, words: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(words), env=self.stage.env | env, stdout=output, stderr=output, cwd="/"
            )
        try:
            yield process
        except BaseException:
            print(f"--- the end of {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, words: list[str], env: dict[str, str] | None = None, timeout_s: float = 300) -> str:
        """What a process of the image prints. Raises Failed."""
        ran = subprocess.run(
            self.command(words),
            env=self.stage.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd="/",
        )
        if ran.returncode:
            raise Failed(f"{' '.join(words)[:200]}: exit code {ran.returncode}\n{(ran.stdout + ran.stderr)[-2000:]}")
        return ran.stdout

    def check_confinement(self) -> None:
        """Raises Failed when its processes can write where they must not, or are somebody."""
        program = (
            "import os, pathlib\n"
            "assert os.getuid() == 10001, os.getuid()\n"
            "pathlib.Path('/tmp/x').touch()\n"
            "for path in ('/x', '/opt/argosy/x', '/etc/x', '/usr/x'):\n"
            "    try:\n        pathlib.Path(path).touch()\n    except OSError:\n        continue\n"
            "    raise SystemExit('wrote ' + path)\n"
        )
        self.run(["python", "-c", program])


def ask(port: int, path: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """(status, body) of one request to loopback; (0, "") while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except OSError:
        return 0, ""
    finally:
        connection.close()


def wait_for(port: int, path: str, status: int, process: subprocess.Popen[bytes], timeout_s: float = START_S) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        found, body = ask(port, path)
        if found == status:
            return str(body)
        if process.poll() is not None:
            raise Failed(f"exit code {process.returncode} before {path} answered {status}")
        if time.monotonic() > deadline:
            raise Failed(f"{path} answered {found} {body[:300]!r}, not {status} within {timeout_s:.0f} s")
        time.sleep(0.2)


def objects() -> dict[tuple[str, str], Object]:
    """(kind, name without its hash) -> object of dev-cpu."""
    found = deployment.objects(render.overlay_spec("dev-cpu"))
    return {
        (key[1], key[2].rpartition("-")[0] if thing.get("immutable") else key[2]): thing for key, thing in found.items()
    }


def gateway_pod(image: Image) -> tuple[list[str], int]:
    """Mounts what the gateway's pod mounts; its command and port."""
    things = objects()
    [container] = things["Deployment", "argosy-gateway"]["spec"]["template"]["spec"]["containers"]
    image.give(SETTINGS_PATH, things["ConfigMap", "argosy-gateway"]["data"])
    image.give(SECRET_PATH, {"secret": SECRET + "\n"})
    return [*image.stage.entrypoint, *container["args"]], 18000


def check_gateway(image: Image, log: Path) -> None:
    image.check_confinement()
    for module in ("torch", "ray", "models", "pip"):
        program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is not None)"
        image.run(["python", "-P", "-c", program])  # without the folder /models of pods that mount one
    words, port = gateway_pod(image)
    with image.running(words, {"ARGOSY_PORT": str(port)}, log) as process:
        wait_for(port, "/livez", 200, process)
        cause = wait_for(port, "/readyz", 503, process)
        process.terminate()
        if process.wait(30) != 0:
            raise Failed(f"exit code {process.returncode} after SIGTERM")
    print(f"gateway: lives, is not ready without a cluster ({cause.strip()[:100]}), ends with 0", flush=True)


def check_engine(image: Image, gateway: Image, scratch: Path) -> None:
    """dev-cpu on one machine."""
    image.check_confinement()
    things = objects()
    cluster = things["RayService", "argosy"]["spec"]["rayClusterConfig"]
    [worker] = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    container, [fetch] = worker["containers"][0], worker["initContainers"]
    image.give(MODEL_PATH, things["ConfigMap", "argosy-model"]["data"])
    image.give(SECRET_PATH, {"secret": SECRET + "\n"})
    begun = time.monotonic()
    data = {k: v for k, v in things["ConfigMap", "argosy-model"]["data"].items() if k.replace("_", "").isupper()}
    image.run(fetch["command"], data | _values(fetch), timeout_s=600)
    print(f"engine: weights fetched by the pod's script in {time.monotonic() - begun:.0f} s", flush=True)
    mount("-o", "remount,ro", str(image.stage.root / MODELS_PATH.strip("/")))
    env = _values(container) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the one switch that lets a Ray node listen on loopback
    }
    start = "ulimit -n 65536; exec ray start --head --block --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 "
    start += f"--num-cpus=2 --object-store-memory={cluster['headGroupSpec']['rayStartParams']['object-store-memory']}"
    with image.running(["/bin/bash", "-c", "--", start], env, scratch / "ray.log") as ray:
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            wait_for(AGENT_PORT, container[kind]["httpGet"]["path"], 200, ray)
        document = yaml.safe_load(things["RayService", "argosy"]["spec"]["serveConfigV2"])
        document["http_options"]["host"] = "127.0.0.1"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        deadline = time.monotonic() + START_S
        while (told := ask(DASHBOARD_PORT, "/api/serve/applications/", "PUT", document, headers))[0] != 200:
            if time.monotonic() > deadline:
                raise Failed(f"Serve does not take the document: {told}")
            time.sleep(1)
        words, port = gateway_pod(gateway)
        words = [w if "directory-url" not in w else "--directory-url=http://127.0.0.1:8000/directory" for w in words]
        with gateway.running(words, {"ARGOSY_PORT": str(port)}, scratch / "gateway.log") as process:
            wait_for(port, "/readyz", 200, process)
            print(f"engine: ready {time.monotonic() - begun:.0f} s after its pod began", flush=True)
            body = {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 8, "seed": 1}
            status, reply = ask(port, "/v1/completions", "POST", body | {"temperature": 0})
            if status != 200 or "Paris" not in reply:
                raise Failed(f"a completion: {status} {reply[:500]}")
    print(f"engine: {json.loads(reply)['choices'][0]['text']!r}", flush=True)


def pip_settings() -> dict[str, str]:
    """Where this machine's pip looks beside the index, as build arguments."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    found = dict(re.findall(r"^\S*\.(find-links|extra-index-url)='(.*)'$", shown.stdout, re.MULTILINE))
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in found.items()}


def _values(container: Object) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}


def inside(kind: str) -> int:
    """In a mount namespace of our own."""
    scratch = Path(tempfile.mkdtemp(prefix="argosy-image-", dir="/tmp"))
    try:
        gateway = Image("gateway", scratch, {"EXTRA": "gateway"})
        if kind == "gateway":
            check_gateway(gateway, scratch / "gateway.log")
        else:
            check_engine(Image("engine", scratch, {"VARIANT": "cpu", **pip_settings()}), gateway, scratch)
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
