"""What a load test leaves behind: one JSON object per line, written as the run goes.

A file is a `run` line, then `request`, `comparison` and `chapter` lines in the order in which they ended, and an
`end` line. Without the `end` line the run was cut off and its figures are not to be trusted.

Every time is in seconds since the run's start, on the monotonic clock of the process that sent the request; the
run line says when that start was by the wall clock. No prompt, no output, no key is in it; the text of an error is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

FORMAT_VERSION = 1
MAX_LINE_BYTES = 64 << 20
"""Longest line that the reader accepts: some two million token times."""


class RecordError(ValueError):
    """A file that is no record of a load test, or a damaged one; the message names the line."""


class Observation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="request"):
    """One request as the client saw it. A time that never came is None."""

    id: int
    """Position in the seeded workload: the same seed gives the same request the same id, in every run."""
    label: str = ""
    """Class of the request within its workload, e.g. "intruder"."""
    tenant: str = ""
    endpoint: str = "completions"
    """completions | chat"""
    is_stream: bool = True
    session: int | None = None
    """Conversation that this request is a turn of."""
    turn: int = 0
    worker: int = 0

    intended_s: float
    """When it should have been sent. Latencies count from here."""
    started_s: float | None = None
    """When the generator took it up. started - intended is the generator's own lag, no fault of the server."""
    sent_s: float | None = None
    """When its last byte had been given to the socket: connecting is between started and sent."""
    headers_s: float | None = None
    first_token_s: float | None = None
    token_times_s: list[float] = []
    """Socket read that brought each event with output, in order; of a stream only. A server may put several tokens
    into an event, so `output_tokens` can be more than its length."""
    end_s: float | None = None

    prompt_tokens: int | None = None
    """From `usage`; None when the server did not say."""
    wanted_prompt_tokens: int | None = None
    """What the workload meant it to be; None where it does not say (data sets of text)."""
    cached_tokens: int | None = None
    output_tokens: int | None = None
    wanted_output_tokens: int | None = None
    status: int | None = None
    """HTTP status; None when no response came."""
    error: str | None = None
    """Class of the failure, one of a few words (`loadtest/failures.py`); None = success."""
    error_detail: str = ""
    """First 200 characters of what was said about it."""
    finish_reason: str | None = None
    queue_position: int | None = None
    """First position that a queue comment named."""
    queue_wait_s: float | None = None
    """Longest wait that a queue comment named."""
    num_comments: int = 0
    num_resumes: int = 0
    """Times that the server said it had resumed the stream elsewhere."""
    server_id: str = ""
    """x-request-id, for GET /v1/requests/{id}."""
    request_hash: str = ""
    """blake2b-128 of method, path, tenant and body bytes, hex."""
    body_seed: int | None = None
    """`seed` of the body."""

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def ttft_s(self) -> float | None:
        """First output, from the intended send time."""
        return None if self.first_token_s is None else self.first_token_s - self.intended_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.intended_s

    @property
    def service_s(self) -> float | None:
        """End from the actual send: what a closed loop would have reported."""
        return None if self.end_s is None or self.started_s is None else self.end_s - self.started_s

    @property
    def itl_s(self) -> list[float]:
        """Gaps between events with output."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None below two tokens."""
        if self.output_tokens is None or self.output_tokens < 2 or len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="comparison"):
    """A request of the run that was sent again, alone, after it."""

    id: int
    is_equal: bool
    """Text, finish reason and logprobs are those of the run."""
    num_logprobs: int = 0
    """Tokens whose logprobs were compared; 0 = text alone."""
    difference: str = ""
    """What differed first, or the error class when the second sending failed; no text."""
    is_failed: bool = False
    """The second sending brought no output to compare."""


class Chapter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="chapter"):
    """From here on the run is at another stage: a step of the arrivals, a rate of the knee search."""

    name: str
    at_s: float
    rate_per_s: float | None = None


class RunHeader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="run"):
    """How the run was meant to be: enough to do it again. Never a secret: tenants by name, keys not at all."""

    format_version: int = FORMAT_VERSION
    started_wall_s: float
    """Unix time of second 0."""
    target: str
    """Base URL."""
    model: str
    seed: int
    mode: str = "open"
    """open | closed"""
    arrivals: dict[str, Any] = {}
    workload: dict[str, Any] = {}
    limits: dict[str, float] = {}
    """Bounds of the generator: what it may lag and use before it calls its own run invalid."""
    num_workers: int = 1
    argosy_version: str = ""
    server: dict[str, Any] = {}
    """What the server said of itself: /v1/models' entry, system_fingerprint."""
    prompt_lengths: str = "exact"
    """exact | approximate | as given"""
    labels: dict[str, Any] = {}
    """Whatever the caller wants to find again."""


class GeneratorHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the generator itself kept up; over all workers, the worst of them."""

    num_intended: int = 0
    num_sent: int = 0
    send_lag_p50_s: float = 0.0
    send_lag_p99_s: float = 0.0
    send_lag_max_s: float = 0.0
    loop_lag_p99_s: float = 0.0
    loop_lag_max_s: float = 0.0
    cpu_fraction: float = 0.0
    """Of one core, in the busiest window."""
    max_in_flight: int = 0


class RunEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="end"):
    """How the run went, as far as its generator is concerned."""

    duration_s: float
    is_valid: bool
    reasons: list[str] = []
    """Why it is not."""
    generator: GeneratorHealth = GeneratorHealth()
    fingerprints: list[str] = []
    """system_fingerprint values seen, at most 16."""


_ENCODER = msgspec.json.Encoder()

Line = RunHeader | Observation | Comparison | Chapter | RunEnd


class Run(msgspec.Struct, kw_only=True):
    """A whole file, in memory."""

    header: RunHeader
    observations: list[Observation] = []
    comparisons: list[Comparison] = []
    chapters: list[Chapter] = []
    end: RunEnd | None = None

    @property
    def is_valid(self) -> bool:
        return self.end is not None and self.end.is_valid


def encode_lines(lines: list[Line]) -> bytes:
    """Lines as they stand in a file."""
    return _ENCODER.encode_lines(lines)


class RecordWriter:
    """Appends lines to a new file. Not safe for several threads."""

    def __init__(self, path: Path | str, header: RunHeader) -> None:
        """Raises OSError when the file cannot be made; one that exists is replaced."""
        self.path = Path(path)
        self._file: BinaryIO = open(self.path, "wb", buffering=1 << 20)  # noqa: SIM115
        self.write(header)
        self._file.flush()

    def write(self, line: Line) -> None:
        self._file.write(_ENCODER.encode(line) + b"\n")

    def write_encoded(self, lines: bytes) -> None:
        """Whole lines from `encode_lines`, perhaps of another process."""
        self._file.write(lines)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path | str) -> Iterator[Line]:
    """Lines of a record, one at a time. Raises RecordError for a line that is none, OSError for the file."""
    decoder = msgspec.json.Decoder(Line)
    with open(path, "rb") as file:
        for number in range(1, 1 << 62):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise RecordError(f"{path}:{number}: longer than {MAX_LINE_BYTES} bytes")
            try:
                yield decoder.decode(raw)
            except msgspec.DecodeError as error:
                raise RecordError(f"{path}:{number}: {error}") from None


def read_run(path: Path | str) -> Run:
    """A whole record. Raises RecordError when it does not begin with its header or is of another version."""
    run: Run | None = None
    for line in read_lines(path):
        if isinstance(line, RunHeader):
            if run is not None:
                raise RecordError(f"{path}: two headers")
            if line.format_version != FORMAT_VERSION:
                raise RecordError(f"{path}: format {line.format_version}, this version reads {FORMAT_VERSION}")
            run = Run(header=line)
        elif run is None:
            raise RecordError(f"{path}: does not begin with a run line")
        elif isinstance(line, Observation):
            run.observations.append(line)
        elif isinstance(line, Comparison):
            run.comparisons.append(line)
        elif isinstance(line, Chapter):
            run.chapters.append(line)
        else:
            run.end = line
    if run is None:
        raise RecordError(f"{path}: is empty")
    return run
