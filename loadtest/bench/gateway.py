"""CPU time that the gateway spends per token delivered, and the delay that it adds (F1), against its ceiling (F0).

The real gateway process, pinned to one core, between replicas that speak the real engine protocol and clients that
read chat streams from raw sockets; replicas and clients share the other cores. Counted in steady state: tokens that
arrived at the clients, and what the gateway's process used meanwhile. The ceiling is a bare uvloop protocol on the
same core that writes the same events, ready-made, to as many clients. Delay: from the replica's write of a step
to the client's read of the event; a step carries one token of every row, so its last row waits for all others.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtest.bench._fake_replica import FakeReplicaSettings, Sent
from loadtest.bench._processes import Process, ProcessFailed, allow_files, running, two_sides
from loadtest.bench._raw_sse import RawSettings
from loadtest.bench._report import line, report
from loadtest.bench._sse_clients import ClientSettings, Seen
from serving.config import GatewaySettings
from serving.types import ModelCard

TARGET_US = 20.0
MAX_DRIFT = 0.05
BACKLOG = 4096
MODEL = "bench"
MAX_MODEL_LEN = 1 << 20
START_TIMEOUT_S = 60.0
NUM_TIMED = 64
_WORD = re.compile("Ġ?[A-Za-z]+")  # one such token is one event


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench gateway", description=__doc__)
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[64, 1024], help="open at once, e.g. 64 256 1024 4096"
    )
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of each stream")
    parser.add_argument("--replicas", type=int, default=1, help="that the streams are spread over, steps staggered")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds between the last start and the window")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the window")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--assets", type=Path, help="folder with tokenizer.json and chat template [the default model]")
    options = parser.parse_args(argv)
    assets = options.assets or default_assets()
    rows, lines = [], []
    try:
        allow_files(4 * max(options.streams) + 512)
        for num_streams in options.streams:
            runs = Runs(num_streams, options)
            for _ in range(options.repeat):  # interleaved
                runs.gateway(assets)
                runs.raw()
            row, result = runs.result()
            rows.append(row)
            lines.append(result)
    except ProcessFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    drift = max(result["ceiling_drift"] for result in lines)
    stable = "" if drift <= MAX_DRIFT else f"; UNSTABLE: the ceiling moved by {drift:.0%} during the run"
    report(
        f"gateway on one core, chat streams of {options.rate:g} tok/s, {options.replicas} replica(s){stable}",
        ["streams", "µs/token", "min–max", "bare uvloop", "fraction", "core", "delay p50", "delay p99"],
        rows,
        lines,
    )
    return 0


def default_assets() -> Path:
    """The default model's folder, pulled first if need be."""
    from models.store import pull
    from serving import config

    settings = config.load()
    return pull(settings.model, store=Path(settings.store))


class Runs:
    """Repeated measurements of one number of streams."""

    def __init__(self, num_streams: int, options: argparse.Namespace) -> None:
        self._num_streams = num_streams
        self._options = options
        self._step_s = 1 / options.rate
        self._measured, self._others = two_sides()
        self._gateway: list[Seen] = []
        self._raw: list[Seen] = []
        self._delays: list[tuple[float, float]] = []  # (p50, p99) per run, in seconds
        self._event = ""

    def gateway(self, assets: Path) -> None:
        """One run of the gateway with its replicas and clients."""
        options = self._options
        with tempfile.TemporaryDirectory(prefix="argosy-bench-", dir="/tmp") as folder, _listen() as listener:
            paths = [f"{folder}/r{number}" for number in range(options.replicas)]
            fake = fake_replicas(paths, assets, self._step_s, self._num_streams)
            settings = GatewaySettings(
                fd=listener.fileno(),
                replicas=tuple(f"unix:{path}" for path in paths),
                secret=fake.secret,
                served_model_name=MODEL,
                cache_dir=f"{folder}/cache",
            )
            with (
                running("loadtest.bench._fake_replica", fake, cores=self._others) as replicas,
                running("serving.gateway", settings, cores=self._measured, fds=(listener.fileno(),)) as gateway,
            ):
                seen = self._watch(gateway, listener, [chat_request(n) for n in range(self._num_streams)])
                gateway.check()
                replicas.ask_to_end()
                sent = replicas.answer(Sent, 10.0)
        self._gateway.append(seen)
        delays = sorted(added_delays(seen, sent))
        if not delays:
            raise ProcessFailed("no event of a timed stream arrived in the window: make --seconds longer")
        self._delays.append((statistics.median(delays), delays[int(0.99 * len(delays))]))
        self._event = self._event or one_event(seen.sample)

    def raw(self) -> None:
        """One run of the ceiling, with the events that the gateway wrote."""
        with _listen() as listener:
            settings = RawSettings(fd=listener.fileno(), event=self._event, step_s=self._step_s)
            with running("loadtest.bench._raw_sse", settings, cores=self._measured, fds=(listener.fileno(),)) as server:
                self._raw.append(self._watch(server, listener, ["GET / HTTP/1.1\r\n\r\n"] * self._num_streams))

    def _watch(self, server: Process, listener: socket.socket, requests: list[str]) -> Seen:
        clients = ClientSettings(
            port=listener.getsockname()[1],
            requests=requests,
            server_pid=server.pid,
            settle_s=self._options.settle,
            window_s=self._options.seconds,
            num_timed=NUM_TIMED,
            start_timeout_s=START_TIMEOUT_S,
        )
        with running("loadtest.bench._sse_clients", clients, cores=self._others) as process:
            return process.answer(Seen, START_TIMEOUT_S + self._options.settle + self._options.seconds + 15.0)

    def result(self) -> tuple[list[str], dict[str, Any]]:
        """(the table's row, the line)."""
        options = self._options
        costs = [_us_per_event(seen) for seen in self._gateway]
        limits = [_us_per_event(seen) for seen in self._raw]
        value, limit = statistics.median(costs), statistics.median(limits)
        core = statistics.median(seen.server_cpu_s / seen.window_s for seen in self._gateway)
        offered = self._num_streams * options.rate
        delivered = statistics.median(seen.num_events / seen.window_s for seen in self._gateway)
        p50_ms, p99_ms = (1e3 * statistics.median(values) for values in zip(*self._delays, strict=True))
        row = [
            f"{self._num_streams:,}",
            f"{value:.1f}",
            f"{min(costs):.1f}–{max(costs):.1f}",
            f"{limit:.1f}",
            f"{limit / value:.0%}",
            f"{core:.0%}",
            f"{p50_ms:.1f} ms",
            f"{p99_ms:.1f} ms",
        ]
        result = line(
            bench=f"gateway {self._num_streams}",
            shape=f"{self._num_streams} chat streams x {options.rate:g} tok/s, {options.replicas} replicas",
            fmt="sse",
            value=round(value, 2),
            unit="us/token",
            min=round(min(costs), 2),
            max=round(max(costs), 2),
            target=TARGET_US,
            limit=round(limit, 2),
            fraction=round(limit / value, 3),
            ceilings={"raw_uvloop_us_per_write": round(limit, 2)},
            ceiling_drift=round(max(limits) / min(limits) - 1, 3),
            core=round(core, 3),
            delivered=round(delivered / offered, 3),
            delay_p50_ms=round(p50_ms, 2),
            delay_p99_ms=round(p99_ms, 2),
            n=options.repeat,
        )
        return row, result


def _listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)


def _us_per_event(seen: Seen) -> float:
    if not seen.num_events:
        raise ProcessFailed("no event arrived in the window: make --seconds longer")
    return 1e6 * seen.server_cpu_s / seen.num_events


def fake_replicas(paths: list[str], assets: Path, step_s: float, num_streams: int) -> FakeReplicaSettings:
    """Replicas that say words of the model in `assets`, with room for all streams."""
    import hashlib

    from serving.gateway.text.tokenizer import ASSETS

    found = {name: assets / name for name in ASSETS if (assets / name).is_file()}
    ids, size = words(assets / "tokenizer.json")
    eos = next(number for number in range(size) if number not in set(ids))
    card = ModelCard(
        fingerprint="bench",
        model=MODEL,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_streams,
        logits_size=size,
        tokenizer_size=size,
        eos_ids=(eos,),
        bos_id=None,
        block_size=16,
        determinism="exact",
        assets={name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()},
    )
    return FakeReplicaSettings(
        paths=paths,
        secret=secrets.token_hex(32),
        card=card,
        assets={name: str(path) for name, path in found.items()},
        ids=ids,
        step_s=step_s,
        max_rows=-(-num_streams // len(paths)) + 16,
    )


def words(tokenizer: Path) -> tuple[list[int], int]:
    """(ids of at most 5,000 tokens that are plain words, size of the vocabulary) of a byte-level tokenizer.json."""
    document = json.loads(tokenizer.read_bytes())
    vocabulary: dict[str, int] = document["model"]["vocab"]
    added = [token["id"] for token in document.get("added_tokens", [])]
    ids = sorted(number for text, number in vocabulary.items() if _WORD.fullmatch(text) and number not in set(added))
    return ids[:5000], max([*vocabulary.values(), *added]) + 1


def chat_request(seed: int) -> str:
    """A whole HTTP request for a stream that does not end by itself."""
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me a long story, number {seed}."}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "max_tokens": MAX_MODEL_LEN // 2,
            "temperature": 0.8,
            "seed": seed,
        }
    )
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


def one_event(piece: str) -> str:
    """The first event of a chunk of the body: "<length>\\r\\n<events>\\r\\n"."""
    _, _, rest = piece.partition("\r\n")
    event, end, _ = rest.partition("\n\n")
    if not event.startswith("data: ") or not end:
        raise ProcessFailed(f"the gateway wrote no event but {piece[:200]!r}")
    return event + end


def added_delays(seen: Seen, sent: Sent) -> list[float]:
    """Seconds between a token's leaving the replica and its arrival, of the timed streams.

    Event 0 of a chat stream is the role's; event k is token k - 1, and a row has one token in every step.
    """
    delays = []
    for seed, arrivals in seen.arrivals.items():
        replica, first = sent.begun[seed]
        times = sent.steps[replica]
        delays += [when - times[first + number - 1] for number, when in arrivals]
    return delays
