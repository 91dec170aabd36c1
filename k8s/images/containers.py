"""Processes of an image as a container engine would start them, and what they answer."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from k8s.images.recipe import Recipe, Stage, mount
from k8s.objects import MODELS_PATH, SECRET_PATH, SETTINGS_PATH, USER
from k8s.weights import MODEL_PATH

ROOT: Final = Path(__file__).parent.parent.parent
START_S: Final = 180.0
_NEW_NETWORK: Final = 0x40000000
_SET_FLAGS, _SET_ADDRESS, _UP = 0x8914, 0x8916, 0x41


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


def ask(
    port: int,
    path: str,
    method: str = "GET",
    body: Any = None,
    *,
    host: str = "127.0.0.1",
    headers: dict[str, str] | None = None,
) -> Any:
    """(status, body) of one request; (0, "") while nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except OSError:
        return 0, ""
    finally:
        connection.close()


def wait_for(
    port: int,
    path: str,
    status: int,
    process: subprocess.Popen[bytes],
    *,
    host: str = "127.0.0.1",
    timeout_s: float = START_S,
) -> str:
    """The body of the first answer with that status. Raises Failed when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, body = ask(port, path, host=host)
        if found == status:
            return str(body)
        if process.poll() is not None:
            raise Failed(f"exit code {process.returncode} before {path} answered {status}")
        if time.monotonic() > deadline:
            raise Failed(f"{path} answered {found} {body[:300]!r}, not {status} within {timeout_s:.0f} s")
        time.sleep(0.2)


def own_network(*addresses: str) -> None:
    """Leave this machine's network for one in which only we are, with these addresses."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise Failed(f"no network of our own: {os.strerror(ctypes.get_errno())}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SET_FLAGS, struct.pack("16sH14x", b"lo", _UP))
        for number, address in enumerate(addresses, start=1):
            name = f"lo:{number}".encode()
            given = struct.pack("16sH2x4s8x", name, socket.AF_INET, socket.inet_aton(address))
            fcntl.ioctl(sock, _SET_ADDRESS, given)
