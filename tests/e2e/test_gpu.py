"""The whole service on a CUDA device under `--runtime local`: a killed replica costs no token there either."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.service import Service, serving
from tests.tiny import tiny_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(280),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no CUDA device here"),
]

MODEL = "tiny"
NUM_TOKENS = 900


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("gpu")
    # Deep, so that a step takes a millisecond: a blow must find streams running.
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 48, "max_position_embeddings": 1024}
    model = tiny_model_folder(folder / "model", **sizes)
    flags = ("--runtime", "local", "--model", str(model), "--served-model-name", MODEL, "--device", "cuda")
    with serving(folder, *flags, "--kv-cache-bytes", "1GiB", timeout_s=200) as service:
        yield service


class Reading(threading.Thread):
    """One streamed completion, its lines with the data and the comments."""

    def __init__(self, service: Service, **body: Any) -> None:
        super().__init__(daemon=True)
        self.body = {"model": MODEL, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, **body}
        self.body["stream_options"] = {"include_usage": True}
        self.service, self.lines, self.headers = service, list[str](), dict[str, str]()
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.service.http.stream("POST", "/v1/completions", json=self.body) as response:
                assert response.status_code == 200, response.read()
                self.headers = dict(response.headers)
                self.lines += response.iter_lines()
        except BaseException as failure:
            self.failure = failure

    def text(self) -> tuple[str, int]:
        """The whole text, and the completion tokens as counted by the server."""
        self.join(120)
        assert self.failure is None and not self.is_alive(), self.failure
        data = [line[6:] for line in self.lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        events = [json.loads(payload) for payload in data[:-1]]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        return text, next(event["usage"]["completion_tokens"] for event in events if event.get("usage"))


def readings(service: Service) -> list[Reading]:
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}]
    ways += [{"temperature": 0, "frequency_penalty": 0.5, "logprobs": 2}]
    return [Reading(service, prompt=f"story {at}", seed=at, **ways[at % 4]) for at in range(8)]


def test_a_killed_replica_costs_no_token(service: Service) -> None:
    undisturbed = [reading.text() for reading in readings(service)]
    assert [count for _, count in undisturbed] == [NUM_TOKENS] * 8
    assert len({text for text, _ in undisturbed}) == 8
    streams = readings(service)
    deadline = time.monotonic() + 60
    while any(len(stream.lines) < 20 for stream in streams):
        assert time.monotonic() < deadline, "the streams do not start"
        time.sleep(0.005)
    assert all(stream.is_alive() for stream in streams), "the streams were over before the blow"
    (victim,) = service.pids().values()
    os.kill(victim, signal.SIGKILL)
    disturbed = [stream.text() for stream in streams]
    assert [count for _, count in disturbed] == [NUM_TOKENS] * 8
    assert service.pids() and victim not in service.pids().values()
    for stream in streams:
        assert stream.headers["x-argosy-determinism"] == "approximate"
        comments = [line for line in stream.lines if line.startswith(":")]
        assert any("resume" in comment for comment in comments), comments
    num_equal = sum(a == b for a, b in zip(undisturbed, disturbed, strict=True))
    print(f"{num_equal} of 8 resumed texts equal the undisturbed ones")


def test_what_is_served_is_said(service: Service) -> None:
    log = Path(service.log).read_text()
    assert service.http.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert "Traceback" not in log
