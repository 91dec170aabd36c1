"""What operators ask, and what importing the gateway costs."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import EngineError, NoCapacity
from serving.metrics.histogram import Histogram
from serving.metrics.labels import MAX_MODELS
from serving.metrics.page import Metrics
from tests.gateway.world import MODEL, Script, a_world


def test_readiness_tells_the_cause() -> None:
    with a_world() as world:
        assert world.get("/readyz").status_code == 200
        assert world.get("/health").status_code == 200
        world.plane.ready = (False, "no replica is ready: loading")
        reply = world.get("/readyz")
        assert (reply.status_code, reply.json()["cause"]) == (503, "no replica is ready: loading")
        assert world.get("/health").status_code == 503
        assert world.get("/livez").status_code == 200
        world.plane.ready = (True, "")
        world.gateway.is_draining = True
        assert world.get("/readyz").status_code == 503


def test_progress_version_models_and_capabilities() -> None:
    with a_world() as world:
        assert world.get("/progressz").json() == {"replicas": world.plane.progress()}
        assert world.get("/version").json()["version"]
        (model,) = world.get("/v1/models").json()["data"]
        assert model == world.get(f"/v1/models/{MODEL}").json()
        assert (model["id"], model["object"], model["created"]) == (MODEL, "model", 1_600_000_000)
        assert world.get("/v1/capabilities").json()["endpoints"]["/v1/completions"]["parameters"]["n"]["maximum"] == 128
        assert world.get("/openapi.json").json()["paths"].keys() >= {"/v1/completions", "/v1/chat/completions"}


def test_metrics_count_what_happened() -> None:
    with a_world(Script(cached_tokens=1, frames=(3,))) as world:
        world.complete(n=2)
        world.complete(stream=True)
        world.complete(n=0)
        world.plane.script.fail_after, world.plane.script.failure = 0, EngineError("x")
        world.complete()
        world.get("/never/heard/of/" + "x" * 100)
        text = world.get("/metrics").text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["argosy_generation_tokens_total", MODEL] == samples["vllm:generation_tokens_total", MODEL] == 27
    assert samples["argosy_choices_finished_total", MODEL, "stop"] == 3
    assert samples["argosy_responses_total", "/v1/completions", "200"] == 2
    assert samples["argosy_responses_total", "/v1/completions", "400"] == 1
    assert samples["argosy_responses_total", "/v1/completions", "500"] == 1
    assert samples["argosy_responses_total", "other", "404"] == 1
    assert samples["argosy_errors_total", "engine_error"] == 1
    assert samples["argosy_time_to_first_token_seconds_count", MODEL] == 2
    assert samples["argosy_inter_token_seconds_count", MODEL] == 6  # three frames per choice
    assert samples["argosy_request_seconds_count", MODEL] == 3
    assert samples["argosy_requests_running", MODEL] == samples["argosy_requests_waiting", MODEL] == 0
    assert samples["argosy_disconnects_total", MODEL] == 0


def test_a_stream_that_breaks_is_counted_once_and_where_it_belongs() -> None:
    with a_world(Script(fail_after=3, failure=NoCapacity("x", reason="draining"))) as world:
        with pytest.raises(httpx.RemoteProtocolError):
            world.complete(stream=True)
        world.plane.script.fail_after = 0
        assert world.complete(stream=True).status_code == 503
        metrics = world.gateway.metrics
    assert metrics.model(MODEL).broken == {"no_capacity": 1}
    assert metrics.errors == {"no_capacity": 1}
    assert metrics.sheds == {"draining": 2}


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.model(f"model-{number}").num_running += 1
    families = {family.name: family for family in metrics.collect()}
    assert len(families["argosy_requests_running"].samples) == MAX_MODELS + 1


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 5.0):
        histogram.observe(value)
    assert histogram.buckets() == ([("0.1", 2), ("1.0", 3), ("+Inf", 4)], 5.65)
    assert histogram.count == 4


def test_importing_the_gateway_imports_neither_torch_nor_ray() -> None:
    code = "import sys, serving.gateway.server, serving.gateway.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "numpy.linalg"} & set(loaded)
