"""`argosy loadtest` against `argosy serve`: exact lengths, equal answers alone, a raw client's times, locust's page."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.record import read_run
from tests.e2e.service import Service, serving
from tests.loadtest import raw_client
from tests.loadtest.load import load
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    model = tiny_model_folder(folder / "tiny")
    flags = ("--model", str(model), "--served-model-name", "tiny", "--runtime", "local", "--kv-cache-bytes", "32MiB")
    with serving(folder, *flags) as service:
        yield service


def test_prompts_have_exact_lengths_and_answers_are_the_same_alone(service: Service, tmp_path: Path) -> None:
    ran = load(
        service.url, tmp_path, "--arrivals", "gamma:rate=15,cv=2", "--requests", "24", "--endpoint", "mixed",
        "--turns", "2", "--prompt-tokens", "uniform:min=30,max=60", "--output-tokens", "uniform:min=4,max=12",
        "--sampling", "mixed", "--stream-share", "0.7", "--verify", "0.4",
    )  # fmt: skip
    assert ran.code == 0, ran.output
    seen = ran.run.observations
    assert len(seen) == 48 and ran.run.header.prompt_lengths == "exact"
    assert all(one.prompt_tokens == one.wanted_prompt_tokens is not None for one in seen)
    assert all(one.output_tokens == one.wanted_output_tokens for one in seen)
    assert {one.endpoint for one in seen} == {"completions", "chat"}
    assert len(ran.run.comparisons) > 5 and all(one.is_equal for one in ran.run.comparisons)
    assert all(one.num_logprobs for one in ran.run.comparisons)
    assert ran.run.end is not None and len(ran.run.end.fingerprints) == 1


def test_its_times_are_those_of_a_raw_socket(service: Service, tmp_path: Path) -> None:
    """One stream of each at a time, at the same time, so that both find the same server: medians within 5 % or 2 ms."""
    body = {"model": "tiny", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    body |= {"logprobs": 0, "seed": 1}  # marks every event that has output
    draw = random.Random(0)
    raw: list[tuple[float, float, list[float]]] = []
    is_over = threading.Event()

    def stream_on() -> None:
        while not is_over.is_set():
            prompt = draw.choices(range(32, 256), k=64)
            raw.append((time.time(), *raw_client.stream(service.url, "/v1/completions", body | {"prompt": prompt})))

    for attempt in range(3):  # on a busy machine a client can be kept from its core
        raw.clear()
        is_over.clear()
        thread = threading.Thread(target=stream_on)
        thread.start()
        try:
            ran = load(
                service.url, tmp_path / str(attempt), "--users", "1", "--requests", "40", "--seed", str(attempt),
                "--prompt-tokens", "64", "--output-tokens", "60", "--extra-body", json.dumps({"logprobs": 0}),
            )  # fmt: skip
        finally:
            is_over.set()
            thread.join()
        seen = ran.run.observations
        assert len(seen) == 40 and all(one.is_ok and len(one.token_times_s) > 30 for one in seen), ran.output
        start = ran.run.header.started_wall_s
        end = start + max(one.end_s or 0 for one in seen)
        meanwhile = [(ttft, gaps) for at, ttft, gaps in raw if start < at < end]
        pairs = [
            (statistics.median(ttft for ttft, _ in meanwhile), statistics.median(one.ttft_s or 0 for one in seen)),
            (
                statistics.median(gap for _, gaps in meanwhile for gap in gaps),
                statistics.median(gap for one in seen for gap in one.itl_s),
            ),
        ]
        if all(abs(ours - theirs) <= max(0.05 * theirs, 0.002) for theirs, ours in pairs):
            return
    raise AssertionError(f"(raw, ours), TTFT and ITL: {pairs}")


def test_locusts_page_shows_the_rows_and_ctrl_c_ends_the_run(service: Service, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.cli", "loadtest", "--target", service.url, "--out", str(tmp_path), "--ui"]
    port = _free_port()
    command += ["--autostart", "--ui-port", str(port), "--rate", "20", "--duration", "120", "--output-tokens", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        kinds: set[str] = set()
        deadline = time.monotonic() + 30
        while not {"E2E", "TTFT", "ITL", "TPOT", "TOKENS-IN", "TOKENS-OUT"} <= kinds and time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                stats = httpx.get(f"http://127.0.0.1:{port}/stats/requests").json()["stats"]
            except httpx.TransportError:
                continue
            kinds = {row["method"] for row in stats}
        assert {"E2E", "TTFT", "ITL", "TPOT", "TOKENS-IN", "TOKENS-OUT"} <= kinds
        assert "locust" in httpx.get(f"http://127.0.0.1:{port}/").text.lower()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    run = read_run(tmp_path / "loadtest.jsonl")
    assert run.end is not None and run.end.reasons[0] == "stopped before its end", output.decode()
    assert run.observations and process.returncode == 3


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
