"""The whole service under `--runtime local` on a tiny model: fast enough for many blows."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.promises import Promises
from tests.e2e.service import Service, Streams, kill_in_the_middle, mixed_requests, serving
from tests.tiny import tiny_model_folder

MODEL = "tiny"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("local")
    # Wide enough that a step takes milliseconds: a blow must find streams running.
    model = tiny_model_folder(
        folder / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, max_position_embeddings=1024
    )
    flags = ("--runtime", "local", "--model", str(model), "--served-model-name", MODEL, "--max-model-len", "1024")
    with serving(folder, *flags, "--kv-cache-bytes", "256MiB") as service:
        yield service


class TestPromises(Promises):
    model = MODEL
    max_model_len = 1024


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_replica_costs_no_token(service: Service, blow: signal.Signals) -> None:
    kill_in_the_middle(service, MODEL, max_tokens=300, number=blow)
    service.wait_until_ready(30)
    resumed = [entry for entry in service.http.get("/v1/requests?limit=16").json()["data"] if entry["num_resumes"]]
    assert resumed, "the blow is in nobody's account"
    for entry in resumed:
        for choice in service.http.get(f"/v1/requests/{entry['id']}").json()["choices"]:
            kinds = [event["kind"] for event in choice["events"]]
            if "lost" in kinds:
                assert kinds[kinds.index("lost") :].count("sent") >= 1
                (lost,) = [event for event in choice["events"] if event["kind"] == "lost"]
                assert lost["cause"] == ("lost" if blow is signal.SIGKILL else "stalled")
                assert "resumed" in [event["cause"] for event in choice["events"] if event["kind"] == "gap"]


def test_the_same_request_gives_the_same_bytes_alone_and_in_company(service: Service) -> None:
    requests = mixed_requests(MODEL, 60)
    together = Streams(service, requests).join()
    alone = [Streams(service, [request]).join()[0] for request in requests]
    for at, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert a == b, f"request {at}"


def test_a_port_that_is_taken_is_named(service: Service, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "serve", "--runtime", "local", "--port", str(service.port)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert str(service.port) in done.stderr and "--port" in done.stderr


def test_a_terminal_chat_against_the_service(service: Service) -> None:
    for url in (service.url, service.url + "/v1"):
        done = subprocess.run(
            [sys.executable, "-m", "serving.cli", "chat", "--url", url],
            input="hello\nand again\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert MODEL in done.stdout
