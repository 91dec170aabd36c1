"""Everything that a run is made of: written once by the command, read by every process of the run.

A plan holds no secret and no data: files of keys, data and traces are named in it, with their hashes, and every
machine of a run has them under the same path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from loadtest.spec import SpecError


class WorkloadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests are; texts as on the command line."""

    endpoint: str = "completions"
    """completions | chat | mixed"""
    stream_share: float = 1.0
    prompt: str = "128"
    output: str = "64"
    data: str | None = None
    """JSON lines of requests, instead of drawn prompts."""
    prefix_tokens: int = 0
    prefix_hit: float = 1.0
    num_prefixes: int = 1
    turns: int = 1
    replies: str = "drawn"
    """drawn | server: what later turns of a conversation hold as the assistant's words."""
    intruder_share: float = 0.0
    intruder_tokens: int = 4096
    sampling: str = "greedy"
    """greedy | default | mixed"""
    ignore_eos: bool = True
    prompt_format: str = "ids"
    """ids | text, of completions"""
    token_ids: tuple[int, int] = (32, 256)
    """Ids from .. to (exclusive) that prompts are made of."""
    extra_body: dict[str, Any] = {}
    """Merged into every body; null takes a field away."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the generator allows itself before it calls the run invalid."""

    max_send_lag_s: float = 0.025
    """99th percentile of started - intended."""
    max_loop_lag_s: float = 0.025
    """99th percentile of how late the event loop wakes."""
    max_cpu: float = 0.9
    """Of one core, in any window of 2 s."""
    max_in_flight: int = 10_000
    """Requests of one worker at once; another is not sent."""


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """Text with known token counts on this server (loadtest/fitting.py)."""

    opener: str = "Go"
    units: tuple[str, ...] = (" one", " two", " three", " four", " five", " six", " seven", " eight")
    """Each costs one token, wherever it stands after another."""
    overhead: dict[str, int] = {}
    """endpoint -> tokens of a prompt that holds the opener alone."""
    turn_overhead: int = 0
    """Tokens that a reply and another message add to a chat, both holding the opener alone."""
    is_exact: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    target: str
    model: str
    seed: int = 0
    arrivals: str = "poisson:1"
    duration_s: float | None = None
    num_requests: int | None = None
    """Arrivals in all (of conversations, with turns)."""
    think_s: float = 0.0
    """Between the turns of a conversation."""
    drain_s: float = 120.0
    """How long answers are waited for after the last request."""
    timeout_s: float = 600.0
    workload: WorkloadPlan = WorkloadPlan()
    limits: Limits = Limits()
    words: Words = Words()
    keys_file: str | None = None
    file_hashes: dict[str, str] = {}
    verify_share: float = 0.0
    max_verified: int = 64
    record: str = "loadtest.jsonl"
    server: dict[str, Any] = {}
    labels: dict[str, Any] = {}

    @property
    def prompt_lengths(self) -> str:
        """exact | approximate | as given"""
        workload = self.workload
        if workload.data is not None:
            return "as given"
        has_text = workload.endpoint != "completions" or workload.prompt_format == "text"
        return "approximate" if has_text and not self.words.is_exact else "exact"


def encode(plan: Plan) -> bytes:
    return msgspec.json.encode(plan)


def decode(data: bytes) -> Plan:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=Plan)


def file_hash(path: Path | str) -> str:
    """sha256 of a file, hex. Raises SpecError naming it."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(str(error)) from None


def check_files(plan: Plan) -> None:
    """On a worker: its files are the command's. Raises SpecError."""
    for path, wanted in plan.file_hashes.items():
        if file_hash(path) != wanted:
            raise SpecError(f"{path} is not the file that the run was planned with")
