"""A real server's page of metrics, and a real Prometheus that scrapes it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics.catalogue import METRICS
from serving.metrics.command import RULES_FILE
from serving.supervisor import free_port
from tests.e2e.service import Service, serving, stream
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parent.parent.parent
MODEL = "tiny"
NUM_TOKENS = 24
MAX_FRACTION = 1.25
"""Of the hardware's limit as measured when a replica starts: too low where other processes had the cores then."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("metrics")
    model = tiny_model_folder(folder / "model")
    flags = ("--runtime", "local", "--model", str(model), "--served-model-name", MODEL)
    with serving(folder, *flags, "--kv-cache-bytes", "16MiB") as service:
        yield service


def body(prompt: str, **others: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0} | others


def samples(service: Service) -> dict[tuple[str, ...], float]:
    """By name and label values in alphabetical order of the labels."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(service.http.get("/metrics").text)
        for sample in family.samples
    }


def settled(read: Callable[[], Any], wanted: Any, timeout_s: float = 10.0) -> Any:
    """What `read` says once it is `wanted`; a replica's counts are up to half a second old."""
    deadline = time.monotonic() + timeout_s
    while (found := read()) != wanted:
        assert time.monotonic() < deadline, f"{found} is not {wanted}"
        time.sleep(0.1)
    return found


def test_the_page_tells_what_was_served(service: Service) -> None:
    before = samples(service)
    assert before["vllm:num_requests_waiting", MODEL] == 0, "there before the first request"
    prompt = "Once upon a time there was a server that counted everything it did."
    for _ in range(3):
        stream(service, "/v1/completions", body(prompt))
    usage = service.http.post("/v1/completions", json=body(prompt, n=2)).json()["usage"]
    assert service.http.post("/v1/completions", json=body(prompt, max_tokens=-1)).status_code == 400
    found = samples(service)
    num_prompt, num_cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    assert (
        found["argosy_generation_tokens_total", MODEL] == 5 * NUM_TOKENS == found["vllm:generation_tokens_total", MODEL]
    )
    assert found["argosy_prompt_tokens_total", MODEL] == 5 * num_prompt
    assert num_cached == (num_prompt - 1) // 16 * 16
    assert found["argosy_cached_tokens_total", MODEL] == 4 * num_cached
    for name in ("time_to_first_token", "queue", "prefill", "decode", "request"):
        assert found[f"argosy_{name}_seconds_count", MODEL] == 4
    spent = {name: found[f"argosy_{name}_seconds_sum", MODEL] for name in ("queue", "prefill", "decode", "request")}
    first = found["argosy_time_to_first_token_seconds_sum", MODEL]
    assert spent["queue"] + spent["prefill"] <= first
    assert spent["queue"] + spent["prefill"] + spent["decode"] <= spent["request"]
    assert min(spent["prefill"], spent["decode"]) > 0
    assert found["argosy_inter_token_seconds_count", MODEL] == 5 * (NUM_TOKENS - 1)
    assert found["argosy_choices_finished_total", MODEL, "length"] == 5
    assert found["argosy_responses_total", "/v1/completions", "200"] == 4
    assert found["argosy_errors_total", "invalid_value"] == 1
    assert found["argosy_replicas", "ready"] == 1
    assert found["argosy_loop_lag_seconds_count",] > 0

    # A replica's: every token but the last of a choice is computed in.
    computed = 5 * (num_prompt + NUM_TOKENS - 1) - 4 * num_cached
    (replica,) = [labels[0] for name, *labels in found if name == "argosy_replica_steps_total"]

    def in_steps() -> float:
        now = samples(service)
        return sum(now[f"argosy_replica_{kind}_tokens_total", replica] for kind in ("prefill", "decode"))

    settled(in_steps, computed)
    found = samples(service)
    assert found["argosy_replica_prefix_hit_tokens_total", replica] == 4 * num_cached
    assert found["argosy_replica_prefix_queried_tokens_total", replica] == 5 * num_prompt
    num_steps = found["argosy_replica_steps_total", replica]
    assert num_steps == found["argosy_replica_step_seconds_count", replica]
    assert num_steps == found["argosy_replica_step_prediction_ratio_count", replica]
    busy, ideal = (found[f"argosy_replica_step_{kind}_seconds_total", replica] for kind in ("busy", "ideal"))
    assert busy == pytest.approx(found["argosy_replica_step_seconds_sum", replica])
    assert 0.0 < ideal / busy <= MAX_FRACTION
    assert 0.0 < found["argosy_replica_hardware_fraction", replica] <= MAX_FRACTION
    assert 0.0 < found["argosy_replica_start_seconds", "limit", replica] < 5.0  # half a second where nothing else runs
    assert found["argosy_replica_start_seconds", "weights", replica] > 0
    assert found["argosy_replica_weights_read_bytes", replica] > 0
    assert found["argosy_replica_rows_running", replica] == found["vllm:kv_cache_usage_perc", MODEL] == 0


def test_every_described_metric_is_on_a_real_servers_page(service: Service) -> None:
    stream(service, "/v1/completions", body("x"))
    families = {
        family.name: family.samples for family in text_string_to_metric_families(service.http.get("/metrics").text)
    }
    assert list(families) == [metric.name for metric in METRICS]
    assert not [name for name, shown in families.items() if not shown]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
def test_prometheus_scrapes_it_and_evaluates_the_rules(service: Service, tmp_path: Path) -> None:
    rules = yaml.safe_load((ROOT / RULES_FILE).read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    job = {"job_name": "argosy", "static_configs": [{"targets": [f"127.0.0.1:{service.port}"]}]}
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [job | {"sample_limit": 20_000, "label_limit": 8}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yaml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as prometheus:
            _scraped(service, prometheus)
    except BaseException:
        print((tmp_path / "log").read_text()[-4000:])
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _scraped(service: Service, prometheus: httpx.Client) -> None:
    def ask(expression: str) -> list[dict[str, Any]]:
        try:
            answer = prometheus.get("/api/v1/query", params={"query": expression})
        except httpx.TransportError:
            return []  # it is starting
        if answer.status_code == 503:
            return []  # likewise
        reply = answer.json()
        assert reply["status"] == "success", reply
        result: list[dict[str, Any]] = reply["data"]["result"]
        return result

    deadline = time.monotonic() + 60
    wanted = ("argosy:ttft_seconds:p95", "argosy:hardware_fraction:5m", "argosy:failed:ratio_5m")
    while not all(map(ask, wanted)):
        assert time.monotonic() < deadline, {expression: ask(expression) for expression in wanted}
        stream(service, "/v1/completions", body("Once upon a time"))
        time.sleep(0.2)
    (target,) = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    evaluated = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert {rule["health"] for rule in evaluated.values()} == {"ok"}
    assert not [name for name, rule in evaluated.items() if rule.get("state") == "firing"]
    (first,) = ask("argosy:ttft_seconds:p95")
    assert first["metric"]["model_name"] == MODEL and 0.0 < float(first["value"][1]) < 60.0
    (fraction,) = ask("argosy:hardware_fraction:5m")
    assert 0.0 < float(fraction["value"][1]) <= MAX_FRACTION
    (counted,) = ask(f'argosy_generation_tokens_total{{model_name="{MODEL}"}}')
    assert float(counted["value"][1]) >= NUM_TOKENS
    assert prometheus.get("/api/v1/label/__name__/values", params={"match[]": '{tenant!=""}'}).json()["data"] == []
