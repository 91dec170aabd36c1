"""A service as a user starts it: the `argosy serve` command, its own processes, real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx


class Service:
    """A running `argosy serve`. Use `serving(...)`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"argosy serve ended with {self.process.returncode}:\n{self.log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/readyz", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()}")

    def replicas(self) -> list[dict[str, Any]]:
        replicas: list[dict[str, Any]] = self.http.get("/progressz").json()["replicas"]
        return replicas

    def pids(self) -> dict[str, int]:
        """Process of every ready replica's rank 0, by replica."""
        return {r["id"]: r["ranks"][0]["pid"] for r in self.replicas() if r["state"] == "ready" and r["ranks"]}

    def wait_for_blocks(self, used: int = 0, timeout_s: float = 5.0) -> None:
        """Until no replica owns more than `used` KV blocks."""
        deadline = time.monotonic() + timeout_s
        while any(r.get("blocks_used", 0) > used or r.get("num_running", 0) for r in self.replicas()):
            assert time.monotonic() < deadline, f"blocks leaked: {self.replicas()}"
            time.sleep(0.05)

    def stop(self) -> int:
        """Ctrl-C. Returns the exit code; nothing may be left behind."""
        children = _descendants(self.process.pid)
        self.http.close()
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=30)
        deadline = time.monotonic() + 5
        while left := [pid for pid in children if _is_alive(pid)]:
            assert time.monotonic() < deadline, f"left behind: {[_command(pid) for pid in left]}"
            time.sleep(0.05)
        return code


@contextlib.contextmanager
def serving(folder: Path, *flags: str, timeout_s: float = 120, cores: set[int] | None = None) -> Iterator[Service]:
    """`argosy serve *flags` on a free port, ready; stopped by Ctrl-C at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", "serve", "--port", str(port), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    service = Service(process, port, log)
    try:
        service.wait_until_ready(timeout_s)
        yield service
        assert service.stop() == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


Stream = list[str]


def stream(service: Service, path: str, body: dict[str, Any]) -> Stream:
    """Payloads of one streamed request, without what differs by design: `id`, `created` (C21) and `cached_tokens`,
    which tells what the replica that admitted the request had computed before."""
    payloads = []
    with service.http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                payload = re.sub(r'"id":"[^"]*"', '"id":""', line[6:])
                payload = re.sub(r'"created":\d+', '"created":0', payload)
                payloads.append(re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', payload))
    return payloads


def by_choice(payloads: Stream) -> dict[int, Stream]:
    """Events of each choice in order; events of no choice (usage, [DONE]) under -1."""
    events: dict[int, Stream] = {}
    for payload in payloads:
        choices = json.loads(payload)["choices"] if payload != "[DONE]" else []
        events.setdefault(choices[0]["index"] if choices else -1, []).append(payload)
    return events


class Streams:
    """Several requests at once, each read in a thread of its own."""

    def __init__(self, service: Service, requests: list[tuple[str, dict[str, Any]]]) -> None:
        self.results: list[Stream | BaseException | None] = [None] * len(requests)
        self._threads = [
            threading.Thread(target=self._read, args=(service, at, path, body), daemon=True)
            for at, (path, body) in enumerate(requests)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, service: Service, at: int, path: str, body: dict[str, Any]) -> None:
        try:
            self.results[at] = stream(service, path, body)
        except BaseException as error:
            self.results[at] = error

    @property
    def are_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def join(self, timeout_s: float = 240) -> list[dict[int, Stream]]:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        failures = [result for result in self.results if not isinstance(result, list)]
        assert not failures, f"{len(failures)} streams failed: {failures[:3]}"
        return [by_choice(result) for result in self.results if isinstance(result, list)]


def mixed_requests(model: str, max_tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """Sixteen streams that use everything a resume must carry over."""
    story = "Once upon a time there was a"
    requests: list[tuple[str, dict[str, Any]]] = []
    for at in range(16):
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "seed": 1000 + at}
        body |= [{"temperature": 0}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9}][at % 3]
        if at % 4 == 0:
            body |= {"frequency_penalty": 0.5, "presence_penalty": 0.2}
        if at % 5 == 0:
            body |= {"stop": ["\n\n\n", "nevermore"]}
        if at % 6 == 1:
            body |= {"logit_bias": {"28": -5}}
        if at % 2:
            body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
        if at % 8 == 7:
            body |= {"n": 2}
        if at % 4 == 3:
            body |= {"messages": [{"role": "user", "content": f"Tell me story number {at}, with emoji."}]}
            if at % 8 == 3:
                body |= {"logprobs": True, "top_logprobs": 3}
            requests.append(("/v1/chat/completions", body))
        else:
            body |= {"prompt": f"{story} {at}"}
            if at % 4 == 2:
                body |= {"logprobs": 4, "return_token_ids": True}
            requests.append(("/v1/completions", body))
    return requests


def kill_in_the_middle(
    service: Service, model: str, max_tokens: int, number: signal.Signals = signal.SIGKILL, rank: int = 0
) -> None:
    """Sixteen mixed streams, a rank of a replica struck while they run: every event is the undisturbed run's."""
    requests = mixed_requests(model, max_tokens)
    undisturbed = Streams(service, requests).join()
    deadline = time.monotonic() + 120
    streams: Streams | None = None
    before: dict[str, int] = {}
    while True:
        if streams is None or streams.are_over:  # between two looks, on a busy machine: nothing was struck yet
            if streams is not None:
                streams.join()  # a stream that failed by itself is no reason to try again
            service.wait_for_blocks()  # the next beat tells how many steps there were
            before = {replica["id"]: replica.get("step") or 0 for replica in service.replicas()}
            streams = Streams(service, requests)
        busiest = max(service.replicas(), key=lambda replica: replica.get("num_running") or 0)
        if (busiest.get("num_running") or 0) >= 8 and busiest["step"] > before.get(busiest["id"], 0) + 10:
            break
        assert time.monotonic() < deadline, "the streams do not start"
        time.sleep(0.02)
    running = {replica["id"]: replica.get("num_running") for replica in service.replicas()}
    assert running[busiest["id"]], "the streams were over before the blow"
    victim = busiest["ranks"][rank]["pid"]
    os.kill(victim, number)
    disturbed = streams.join()
    for at, (got, wanted) in enumerate(zip(disturbed, undisturbed, strict=True)):
        assert got.keys() == wanted.keys(), f"stream {at}"
        for choice in wanted:
            for ours, theirs in zip(got[choice], wanted[choice], strict=False):
                assert ours == theirs, f"stream {at}, choice {choice}"
            assert len(got[choice]) == len(wanted[choice]), f"stream {at}, choice {choice}"
    assert all(events[-1][-1] == "[DONE]" for events in disturbed)


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
