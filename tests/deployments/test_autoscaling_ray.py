"""Autoscaling through a real Ray Serve, with the engine and a gateway: none, one, two replicas, and back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.config import EngineSettings
from serving.deployments.document import MODEL_APP, MODEL_DEPLOYMENT, ReplicaArguments, autoscaling_config, serve_config
from serving.supervisor import free_port
from tests.conftest import RayCluster
from tests.stand_in import eventually
from tests.tiny import tiny_model_folder

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")]

MODEL = "tiny"
ROWS = 2
BODY: dict[str, Any] = {"model": MODEL, "prompt": "ahoy", "temperature": 0.8, "seed": 1, "ignore_eos": True}


@pytest.fixture
def gateway(ray_cluster: RayCluster, tmp_path: Path) -> Iterator[httpx.Client]:
    """`argosy gateway` in front of a model that has no replica yet."""
    model = ReplicaArguments(
        engine=EngineSettings(
            model_dir=str(tiny_model_folder(tmp_path / "model")),
            served_model_name=MODEL,
            dtype="float32",
            max_model_len=256,
            max_num_seqs=ROWS,
            kv_cache_bytes=1 << 24,
            num_threads=1,
        ),
        secret_file=str(ray_cluster.secret_file),
        drain_timeout_s=5.0,
    )
    settings = {"rows_per_replica": ROWS, "max_queue_delay_s": 0.5, "scale_in_window_s": 4.0, "start_s": 5.0}
    document = serve_config(
        model,
        num_cpus=0.1,
        autoscaling=autoscaling_config(0, 2, settings),
        secret_file=str(ray_cluster.secret_file),
    )
    ray_cluster.deploy(document)
    port = free_port()
    flags = {"directory-url": ray_cluster.directory_url, "secret-file": ray_cluster.secret_file, "port": port}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", "gateway", *(f"--{key}={value}" for key, value in flags.items())],
            env=os.environ
            | {
                "ARGOSY_MIN_REPLICAS": "0",
                "ARGOSY_SERVED_MODEL_NAME": MODEL,
                "ARGOSY_STORE": str(tmp_path),
                "ARGOSY_QUEUE_TIMEOUT_S": "60",
            },
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def num_replicas() -> int:
    """That run, by Serve's word."""
    from ray import serve

    deployments = serve.status().applications[MODEL_APP].deployments
    return deployments[MODEL_DEPLOYMENT].replica_states.get("RUNNING", 0) if deployments else 0


def target() -> int:
    """Replicas that Serve has been told to have."""
    from ray import serve

    states = serve.status().applications[MODEL_APP].deployments[MODEL_DEPLOYMENT].replica_states
    return sum(states.get(state, 0) for state in ("RUNNING", "STARTING"))


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


class Clients:
    """Threads that complete one request after the other until told to stop; every answer is kept."""

    def __init__(self, client: httpx.Client, count: int, max_tokens: int) -> None:
        self.statuses: list[int] = []  # 0: cut short, -1: no answer
        self.is_over = False
        self._client = client
        self._body = BODY | {"max_tokens": max_tokens}
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self.is_over:
            status = -1
            with contextlib.suppress(httpx.HTTPError):
                answer = self._client.post("/v1/completions", json=self._body)
                status = answer.status_code
                if status == 200 and answer.json()["usage"]["completion_tokens"] != self._body["max_tokens"]:
                    status = 0
            self.statuses.append(status)

    def stop(self) -> None:
        self.is_over = True
        for thread in self._threads:
            thread.join(120)


def test_from_none_to_two_and_back_without_losing_a_request(gateway: httpx.Client) -> None:
    # None is a state to serve from: the gateway says ready, and has nothing behind it.
    eventually(lambda: is_ready(gateway), 60.0)
    assert num_replicas() == 0

    # 0 -> 1: the request is held, which is demand, which wakes a replica.
    answer = gateway.post("/v1/completions", json=BODY | {"max_tokens": 8})
    assert answer.status_code == 200, answer.text
    eventually(lambda: num_replicas() == 1, 10.0)  # Serve learns it a moment after the gateway

    # 1 -> 2: more clients than it has rows.
    begun = time.monotonic()
    clients = Clients(gateway, 12, max_tokens=240)
    eventually(lambda: target() == 2, 20.0)
    assert time.monotonic() - begun < 6.0, "decided within three seconds, and twice that where others use the cores"
    eventually(lambda: num_replicas() == 2, 60.0)

    # 2 -> 1, with a trickle of requests all the time.
    clients.stop()
    assert clients.statuses and set(clients.statuses) == {200}
    trickle = Clients(gateway, 1, max_tokens=4)
    try:  # a slow start, as on a busy machine, makes the policy slower to remove
        eventually(lambda: num_replicas() == 1, 150.0)
    finally:
        trickle.stop()
    assert set(trickle.statuses) == {200}
