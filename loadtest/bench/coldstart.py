"""How long `argosy serve` takes until a completion would be served, by phase, and how long it takes to end (K1).

A fresh `argosy serve` on a free port each time, on a warm disk cache unless --cold. Counted from the start of its
process: every phase that it reports, the ready line, the first streamed token; then SIGTERM and a clean end. The limit
is what no start can do without: a fresh interpreter that imports torch, and one read of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loadtest.bench._report import line, report

TARGETS_S = {"local": 8.0, "ray": 25.0}
END_TIMEOUT_S = 30.0
SHOWN_GAP_S = 0.2
# SIGTERM, should this process die: the supervisor then ends everything below it.
_LEASHED = "import os, sys; from serving.leash import leash; leash(int(sys.argv.pop(1)), {signal}); \
from serving.cli import main; main()"
_PHASE = re.compile(r"(?P<who>(?!cold start)[^|:]+): (?P<name>[^|:]+) (?P<seconds>\d+\.\d+) s(?: \((?P<rate>[^)]+)\))?")
_READY = re.compile(r"ready (?P<url>http://\S+)/v1 serves (?P<model>.+) after \d+\.\d+ s; try:")


class StartFailed(Exception):
    """The service did not come up, or did not end as it should; the text has its last words."""


@dataclasses.dataclass
class Start:
    """One start. Times in seconds since the process was made."""

    phases: dict[str, tuple[float, float]]  # "who: name" -> (how long it took, when it had ended)
    ready_s: float
    first_token_s: float
    end_s: float  # from SIGTERM to the exit


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench coldstart", description=__doc__)
    parser.add_argument("--runtime", nargs="+", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("--model", default=None, help="as for argosy serve")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one start may take")
    parser.add_argument("--cold", action="store_true", help="drop the weights from the disk cache before each start")
    options = parser.parse_args(argv)
    from models.store import StoreError

    try:
        folder = model_folder(options.model)
        floor_s, weight_bytes = floor(folder, options.repeat)
        starts: dict[str, list[Start]] = {runtime: [] for runtime in options.runtime}
        for _ in range(options.repeat):
            for runtime in options.runtime:  # interleaved
                if options.cold:
                    drop_from_cache(weight_files(folder))
                starts[runtime].append(start_and_end(runtime, options.model, options.timeout))
    except (StartFailed, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows: list[list[str]] = []
    lines = []
    for runtime, runs in starts.items():
        phases = median_phases(runs)
        silence_s = add_phase_rows(rows, runtime, phases)
        ready = [run.ready_s for run in runs]
        value = statistics.median(ready)
        first_token = statistics.median(run.first_token_s for run in runs)
        end = statistics.median(run.end_s for run in runs)
        rows.append([runtime, f"READY ({min(ready):.1f}–{max(ready):.1f})", "", f"{value:.2f}"])
        rows.append([runtime, "first token", f"{first_token - value:.2f}", f"{first_token:.2f}"])
        rows.append([runtime, "clean end", f"{end:.2f}", ""])
        lines.append(
            line(
                bench=f"coldstart {runtime}",
                shape=folder.name,
                fmt="cold disk cache" if options.cold else "warm disk cache",
                value=round(value, 2),
                unit="s",
                min=round(min(ready), 2),
                max=round(max(ready), 2),
                target=TARGETS_S[runtime],
                limit=round(floor_s, 2),
                fraction=round(floor_s / value, 3),
                ceilings={"import_torch_and_read_weights_s": round(floor_s, 2), "weight_bytes": weight_bytes},
                phases={name: round(seconds, 2) for name, (seconds, _) in phases.items()},
                unreported_s=round(silence_s, 2),
                first_token_s=round(first_token, 2),
                end_s=round(end, 2),
                n=options.repeat,
            )
        )
    title = f"cold start of {folder.name}; no start beats {floor_s:.2f} s"
    report(title, ["runtime", "phase", "seconds", "done at"], rows, lines)
    return 0


def add_phase_rows(rows: list[list[str]], runtime: str, phases: dict[str, tuple[float, float]]) -> float:
    """Appends a row per phase, and one for what no phase explains before it. Returns the seconds of the latter."""
    silence_s, told = 0.0, 0.0
    for name, (seconds, ended) in phases.items():
        gap = ended - seconds - told
        if gap > 0:
            silence_s += gap
        if gap > SHOWN_GAP_S:
            rows.append([runtime, "(processes start)", f"{gap:.2f}", f"{ended - seconds:.2f}"])
        rows.append([runtime, name, f"{seconds:.2f}", f"{ended:.2f}"])
        told = max(told, ended)
    return silence_s


def model_folder(model: str | None) -> Path:
    """The model's folder, pulled first if need be: a download is no part of a start."""
    from models.store import pull
    from serving import config

    settings = config.load({"model": model})
    return pull(settings.model, store=Path(settings.store))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def floor(folder: Path, repeat: int) -> tuple[float, int]:
    """(best seconds to import torch in a fresh interpreter and to read the weights once, bytes of the weights)."""
    imports, reads = [], []
    files = weight_files(folder)
    buffer = bytearray(1 << 22)
    for _ in range(repeat):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        imported = time.perf_counter()
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        imports.append(imported - begun)
        reads.append(time.perf_counter() - imported)
    return min(imports) + min(reads), sum(path.stat().st_size for path in files)


def drop_from_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # it keeps dirty pages
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def start_and_end(runtime: str, model: str | None, timeout_s: float) -> Start:
    """Start it, have one token, end it. Raises StartFailed."""
    arguments = ["serve", "--runtime", runtime, "--port", "0", *(["--model", model] if model else [])]
    deadline = time.monotonic() + timeout_s
    with serving(arguments) as service:
        phases: dict[str, tuple[float, float]] = {}
        replicas: dict[str, str] = {}  # Ray's names of them are new each time
        while (ready := _READY.fullmatch(text := service.line(deadline))) is None:
            if phase := _PHASE.fullmatch(text):
                who = phase["who"]
                if who.startswith("replica "):
                    who = replicas.setdefault(who, f"replica {len(replicas)}")
                phases[f"{who}: {phase['name']}"] = float(phase["seconds"]), service.age_s
        ready_s = service.age_s
        try:
            have_a_token(ready["url"], ready["model"], deadline)
        except (OSError, http.client.HTTPException) as error:
            raise StartFailed(f"{runtime}: ready, but a completion fails: {error!r}; {service.last_words()}") from None
        first_token_s = service.age_s
        return Start(phases, ready_s, first_token_s, service.end())


class Service:
    """One `argosy serve`, its output line by line."""

    def __init__(self, arguments: list[str]) -> None:
        self._begun = time.monotonic()
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _LEASHED.format(signal=int(signal.SIGTERM)), str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._begun

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for text in self._popen.stdout:
            self._lines.put(text.rstrip("\n"))
        self._lines.put(None)

    def line(self, deadline: float) -> str:
        """The next line of its output. Raises StartFailed when it ends, or when `deadline` passes."""
        try:
            text = self._lines.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise StartFailed(f"not ready in time; {self.last_words()}") from None
        if text is None:
            raise StartFailed(f"it exited with {self._popen.wait()}; {self.last_words()}")
        self._said.append(text)
        return text

    def last_words(self) -> str:
        return "its last words:\n" + "\n".join(self._said[-15:])

    def end(self) -> float:
        """Seconds from SIGTERM to its exit. Raises StartFailed when it does not end, or with a failure."""
        begun = time.monotonic()
        self._popen.terminate()
        try:
            code = self._popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise StartFailed(f"it did not end within {END_TIMEOUT_S:g} s; {self.last_words()}") from None
        if code:
            raise StartFailed(f"it ended with {code}; {self.last_words()}")
        return time.monotonic() - begun

    def close(self) -> None:
        """End it, whatever has happened. Idempotent."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()  # the leashes of its children do the rest
                self._popen.wait()
        self._reader.join(5.0)
        assert self._popen.stdout is not None
        self._popen.stdout.close()


@contextlib.contextmanager
def serving(arguments: list[str]) -> Iterator[Service]:
    """`argosy` with these arguments, for the length of the block."""
    service = Service(arguments)
    try:
        yield service
    finally:
        service.close()


def have_a_token(url: str, model: str, deadline: float) -> None:
    """Returns when the first token of a streamed completion has arrived. Raises OSError or HTTPException."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=max(deadline - time.monotonic(), 1.0))
    try:
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 2, "stream": True, "ignore_eos": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(response.read(500).decode(errors="replace"))
        while text := response.readline():
            if text.startswith(b"data: {"):
                return
        raise http.client.HTTPException("the stream ended without a token")
    finally:
        connection.close()


def median_phases(starts: list[Start]) -> dict[str, tuple[float, float]]:
    """Of every phase that all starts reported, in order of their ends: medians of (how long, ended when)."""
    names = [name for name in starts[0].phases if all(name in start.phases for start in starts)]
    found: dict[str, Any] = {
        name: tuple(statistics.median(start.phases[name][part] for start in starts) for part in (0, 1))
        for name in names
    }
    return dict(sorted(found.items(), key=lambda item: item[1][1]))
