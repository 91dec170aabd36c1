"""Small stand-ins for the engine's front and the gateway, with their interfaces.

As a module (`python -m tests.stand_in SETTINGS`) it is a gateway that answers /readyz and /who.
"""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from serving.config import EngineSettings, GatewaySettings
from serving.engine.address import bind
from serving.errors import ModelLoadError
from serving.types import ModelCard, RankState


class StandInServer:
    """serving.engine.server.ReplicaServer without an engine.

    A connection sends one word: "who" answers "<pid> <epoch>", "sick" makes health() false,
    "exit" ends the process. model_dir "broken" fails to load, as do others beside which a .gone lies;
    "too-big" is killed. `served_model_name` "slow-drain" drains for two seconds.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        replica_id: str,
        secret: bytes,
        listen: str,
        on_phase: Callable[[str, float], None] | None = None,
        on_load: Callable[[int, int, float], None] | None = None,
        ranks: Sequence[socket.socket] = (),
    ) -> None:
        assert len(secret) == 32
        self.ranks = ranks  # real ones, which wait for their first order
        self._settings = settings
        self._on_phase = on_phase or (lambda name, seconds: None)
        self._on_load = on_load or (lambda done, total, seconds: None)
        self._listener, self.address = bind(listen)
        self.epoch = time.time_ns() & 0x7FFFFFFFFFFF
        self._sick = ""
        self.card = ModelCard(
            fingerprint="f0",
            model=settings.served_model_name,
            max_model_len=64,
            max_num_seqs=settings.max_num_seqs,
            logits_size=32,
            tokenizer_size=32,
            eos_ids=(0,),
            bos_id=None,
            block_size=16,
            determinism="exact",
            assets={},
        )

    def start(self) -> None:
        if self._settings.model_dir == "broken":
            raise ModelLoadError("tensor model.norm.weight is missing")
        if Path(self._settings.model_dir).with_suffix(".gone").exists():
            raise ModelLoadError("tensor model.norm.weight has gone")
        if self._settings.model_dir == "too-big":
            os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does when memory runs out
        self._on_load(1_000_000, 1_000_000, 0.01)
        self._on_phase("load", 0.01)
        self._listener.listen()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                word = connection.recv(64).decode()
                if word == "sick":
                    self._sick = "told to be sick"
                elif word == "exit":
                    os._exit(7)
                connection.sendall(f"{os.getpid()} {self.epoch}".encode())

    def health(self) -> tuple[bool, str]:
        return not self._sick, self._sick

    def progress(self) -> list[RankState]:
        return [RankState(rank=0, host="localhost", pid=os.getpid(), step=0, age_s=0.0)]

    def drain(self, timeout_s: float) -> None:
        if self._settings.served_model_name == "slow-drain":
            time.sleep(min(2.0, timeout_s))

    def close(self) -> None:
        self._listener.close()


def ask(address: str, word: str = "who", timeout_s: float = 10.0) -> tuple[int, int]:
    """(pid, epoch) of the stand-in at "unix:…" or "tcp:host:port"; waits until it answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if address.startswith("unix:"):
                connection = socket.socket(socket.AF_UNIX)
                connection.connect(address.removeprefix("unix:"))
            else:
                _, host, port = address.split(":")
                connection = socket.create_connection((host, int(port)))
            with connection:
                connection.settimeout(1.0)
                connection.sendall(word.encode())
                reply = connection.recv(64).split()
            if word == "exit":
                return 0, 0
            return int(reply[0]), int(reply[1])
        except (OSError, IndexError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def fetch(url: str, timeout_s: float = 5.0) -> tuple[int, Any]:
    """(status, body) of a GET; the body as JSON, or as text where it is not JSON."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=timeout_s)
    try:
        connection.request("GET", "/" + path)
        response = connection.getresponse()
        body = response.read()
        try:
            return response.status, msgspec.json.decode(body)
        except msgspec.DecodeError:
            return response.status, body.decode(errors="replace")
    finally:
        connection.close()


def eventually(check: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The first true value of `check`; fails with the last one after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"still {value!r} after {timeout_s} s"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class _Handler(http.server.BaseHTTPRequestHandler):
    settings: GatewaySettings

    def do_GET(self) -> None:
        members = [self._who(address) for address in self.settings.replicas]
        if self.settings.directory_url is not None:
            members = fetch(f"{self.settings.directory_url}?since=-1")[1]["replicas"]
        ready = bool(members) and all(members)
        body = msgspec.json.encode({"pid": os.getpid(), "members": members, "argv": sys.argv[1:]})
        self.send_response(200 if ready or self.path == "/who" else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def _who(address: str) -> Any:
        try:
            return ask(address, timeout_s=0.0)
        except OSError:
            return None

    def log_message(self, format: str, *args: Any) -> None:
        print("served", args[0], flush=True)


def serve_gateway(argument: str) -> None:
    settings = msgspec.json.decode(argument, type=GatewaySettings)
    if settings.served_model_name == "dead-gateway":
        sys.exit("no such thing as a gateway")
    _Handler.settings = settings
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=settings.fd)
    server.serve_forever()


if __name__ == "__main__":
    serve_gateway(sys.argv[1])
