"""Settings: who wins, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serving import config, found
from serving.config import ServeSettings
from serving.errors import SettingsError
from serving.parsing import parse_bytes

HOME = {"HOME": "/home/somebody"}


def load(flags: dict[str, object] | None = None, *, file: Path | None = None, **environ: str) -> ServeSettings:
    return config.load(flags, config=file, environ=HOME | environ)


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "argosy.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "port: 1001\nreplicas: 2\nmax-num-seqs: 4\nmax_queue_len: 7\n")
    settings = load({"port": "1003", "seed": None}, file=file, ARGOSY_PORT="1002", ARGOSY_REPLICAS="3")
    assert settings.port == 1003
    assert settings.replicas == 3
    assert settings.engine.max_num_seqs == 4
    assert settings.gateway.max_queue_len == 7
    assert settings.engine.seed == 0
    assert settings.runtime == "ray" and settings.host == "127.0.0.1" and load().port == 8000


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "replicas: 5")
    assert load(ARGOSY_CONFIG=str(file)).replicas == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("1.5G", 1_500_000_000),
        ("4096", 4096),
        ("8 kb", 8000),
        ("1ti", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "2 XiB", "12 apples", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "http"}, "--port: expected a whole number, not 'http'"),
        ({"port": "65536"}, "--port: 65,536 is outside 0 to 65,535"),
        ({"port": "-1"}, "--port: -1 is outside 0 to 65,535"),
        ({"replicas": "0"}, "--replicas: 0 is outside 1 to 64"),
        ({"runtime": "slurm"}, "--runtime: 'slurm' is not one of ray, local"),
        ({"dtype": "int3"}, "--dtype: 'int3' is not one of bfloat16, float16, float32"),
        ({"kv_cache_bytes": "lots"}, "--kv-cache-bytes: expected a size such as 512MiB or 2GiB, not 'lots'"),
        ({"kv_cache_bytes": "1KiB"}, "--kv-cache-bytes: 1,024 is outside 1,048,576 to"),
        ({"seed": "1.5"}, "--seed: expected a whole number, not '1.5'"),
        ({"model": " "}, "--model: name a model, for example smollm2-135m-instruct"),
        ({"gateways": "2"}, "--gateways: several gateway processes (2) comes with a later release"),
        ({"tensor_parallel_size": "0"}, "--tensor-parallel-size: 0 is outside 1 to 64"),
        ({"pipeline_parallel_size": "65"}, "--pipeline-parallel-size: 65 is outside 1 to 64"),
        ({"quantization": "int2"}, "--quantization: 'int2' is not one of auto, none, int8, int4"),
        ({"collectives": "mpi"}, "--collectives: 'mpi' is not one of auto, shared-memory, gloo, nccl"),
        ({"collectives": "nccl"}, "--collectives: nccl moves tensors of --device cuda, not cpu; leave it at auto"),
        ({"collectives": "gloo", "device": "cuda"}, "--collectives: gloo moves tensors of --device cpu, not cuda"),
    ],
)
def test_a_refusal_names_the_flag_the_limit_and_the_value(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load(flags)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 8000", "argosy.yaml: prot: unknown setting; did you mean port?"),
        ("engine: {seed: 1}", "argosy.yaml: engine: unknown setting"),
        ("fd: 3", "argosy.yaml: fd: unknown setting"),
        ("secret: abc", "argosy.yaml: secret: unknown setting"),
        ("port: [1, 2]", "argosy.yaml: port: expected one value, not a list"),
        ("port: true", "argosy.yaml: port: expected a value, not true"),
        ("port:", "argosy.yaml: port: a value is missing"),
        ("- port", "expected `name: value` lines, not a list"),
        ("port: {", "not YAML"),
    ],
)
def test_files_are_refused_by_name_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load(file=yaml_file(tmp_path, text))
    assert message in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: No such file"):
        load(file=tmp_path / "nowhere.yaml")


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not YAML"):
        load(file=yaml_file(tmp_path, "model: !!python/object/apply:os.getcwd []"))


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(SettingsError, match="ARGOSY_REPLICA: unknown setting; did you mean ARGOSY_REPLICAS"):
        load(ARGOSY_REPLICA="2")


def test_variables_that_kubernetes_adds_for_a_service_named_argosy_are_not_settings() -> None:
    settings = load(
        ARGOSY_PORT="tcp://10.0.0.1:80",
        ARGOSY_SERVICE_HOST="10.0.0.1",
        ARGOSY_SERVICE_PORT_HTTP="80",
        ARGOSY_PORT_80_TCP_ADDR="10.0.0.1",
        ARGOSY_GATEWAY_SERVICE_PORT="80",
    )
    assert settings.port == 8000


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("org/model-7b", "org/model-7b"),
        ("./weights/Tiny.Q4_1.gguf", "Tiny.Q4_1"),
        ("/models/llama-tiny/", "llama-tiny"),
        ("~nobody-has-this-name/x", "x"),
        ("x" * 300, "x" * 300),
    ],
)
def test_the_served_name_follows_the_model(model: str, name: str) -> None:
    settings = load({"model": model})
    assert settings.served_model_name == settings.engine.served_model_name == settings.gateway.served_model_name == name
    assert load({"model": model, "served_model_name": "other"}).engine.served_model_name == "other"


def test_the_store_lies_in_the_users_cache() -> None:
    assert load().store == "/home/somebody/.cache/argosy/models"
    assert load(XDG_CACHE_HOME="/c").store == "/c/argosy/models"
    assert load(XDG_CACHE_HOME="/c", ARGOSY_STORE="/s").store == "/s"
    assert load({"store": "~/s"}).store == str(Path.home() / "s")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1  # type: ignore[misc]


def test_what_is_shown_as_asked_is_a_config_file(tmp_path: Path) -> None:
    settings = load({"port": "0", "kv_cache_bytes": "64MiB", "runtime": "local"}, ARGOSY_MAX_NUM_SEQS="3")
    asked = found.shown(settings, found.find(settings))["asked"]
    assert load(file=yaml_file(tmp_path, yaml.safe_dump(asked))) == settings
    assert "secret" not in asked and "fd" not in asked


def test_a_gang_and_a_format_are_asked_for_by_flags() -> None:
    settings = load(
        {
            "tensor_parallel_size": "2",
            "pipeline_parallel_size": "3",
            "quantization": "int8",
            "dtype": "float16",
            "collectives": "gloo",
        }
    )
    asked = settings.engine
    assert (asked.tensor_parallel_size, asked.pipeline_parallel_size) == (2, 3)
    assert (asked.quantization, asked.dtype, asked.collectives) == ("int8", "float16", "gloo")
    plain = load().engine
    assert (plain.tensor_parallel_size, plain.quantization, plain.collectives) == (1, "auto", "auto")
    assert load({"device": "cuda", "collectives": "nccl"}).engine.collectives == "nccl"


def test_threads_are_shared_among_replicas() -> None:
    one = found.find(load())
    assert one.num_threads == one.cores
    assert found.find(load({"replicas": "64"})).num_threads == 1
    gang = load({"tensor_parallel_size": "2", "pipeline_parallel_size": "2"})
    assert found.find(gang).num_threads == max(1, one.cores // 4)
    assert found.find(load(ARGOSY_NUM_THREADS="3")).num_threads == 3


# --- does the model fit? ------------------------------------------------------------------------


def model_folder(folder: Path, *, megabytes: int = 100, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"} | fields))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(megabytes << 20)
    return folder


def facts(settings: ServeSettings, available: int) -> found.Found:
    return dataclasses.replace(found.find(settings), memory_available_bytes=available)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    settings = load({"replicas": "2", "kv_cache_bytes": "512MiB", "dtype": "float32"})
    folder = model_folder(tmp_path)
    needed = 2 * ((200 << 20) + (512 << 20) + (400 << 20))
    found.check_model(folder, settings, facts(settings, needed))
    with pytest.raises(SettingsError) as refusal:
        found.check_model(folder, settings, facts(settings, needed - 1))
    for part in ("2.2 GiB", "200 MiB weights", "512 MiB KV cache", "x 2 replicas", "are free", "--replicas"):
        assert part in str(refusal.value)


def test_every_rank_of_a_gang_costs_a_process_and_a_format_saves_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    gang = load({"tensor_parallel_size": "2", "pipeline_parallel_size": "2", "kv_cache_bytes": "128MiB"})
    with pytest.raises(SettingsError, match=r"needs 2\.2 GiB .*100 MiB weights \+ 512 MiB KV cache \+ 1\.6 GiB proc"):
        found.check_model(folder, gang, facts(gang, 1 << 20))
    for quantization, weights in (("none", "100"), ("int8", "50"), ("int4", "28")):
        settings = load({"quantization": quantization})
        with pytest.raises(SettingsError, match=f"{weights} MiB weights"):
            found.check_model(folder, settings, facts(settings, 1 << 20))


def test_an_unsupported_architecture_is_refused_by_name_with_what_is_supported(tmp_path: Path) -> None:
    settings = load()
    with pytest.raises(SettingsError, match=r"'mamba' is not supported; this build serves .*llama"):
        found.check_model(model_folder(tmp_path, model_type="mamba"), settings, found.find(settings))


def test_settings_and_facts_need_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from serving import cli, config, found, launch; s = config.load({}, environ={});"
        "found.find(s); assert not {'torch', 'ray', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_budget_of_a_step_holds_a_token_for_every_row() -> None:
    assert config.load({"max_num_seqs": "512"}, environ={}).engine.max_num_batched_tokens == 512
    assert config.load({"max_num_seqs": "8"}, environ={}).engine.max_num_batched_tokens == 256
    assert config.load({"device": "cuda"}, environ={}).engine.max_num_batched_tokens == 2048
    assert config.load({"device": "cuda", "max_num_seqs": "4096"}, environ={}).engine.max_num_batched_tokens == 4096
    with pytest.raises(SettingsError, match="64 is less than --max-num-seqs 100"):
        config.load({"max_num_seqs": "100", "max_num_batched_tokens": "64"}, environ={})


@pytest.mark.parametrize(
    ("flags", "bounds"),
    [
        ({}, (1, None, None)),
        ({"max_replicas": "4"}, (4, 1, 4)),
        ({"min_replicas": "0", "max_replicas": "4"}, (4, 0, 4)),
        ({"replicas": "3", "min_replicas": "2"}, (3, 2, 3)),
        ({"min_replicas": "0"}, (1, 0, 1)),
        ({"min_replicas": "2"}, (2, 2, 2)),
    ],
)
def test_bounds_of_autoscaling(flags: dict[str, object], bounds: tuple[int, int | None, int | None]) -> None:
    settings = load(flags)
    assert (settings.replicas, settings.min_replicas, settings.max_replicas) == bounds
    assert settings.is_autoscaled == (bounds[1] is not None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"min_replicas": "3", "max_replicas": "2"}, "--min-replicas: 3 is above --max-replicas 2"),
        ({"min_replicas": "1", "runtime": "local"}, "--min-replicas: --runtime local does not autoscale"),
        ({"max_replicas": "2", "runtime": "local"}, "--max-replicas: --runtime local does not autoscale"),
        ({"replicas": "3", "max_replicas": "2"}, "--replicas: 3 is not --max-replicas 2"),
        ({"max_replicas": "65"}, "--max-replicas: 65 is outside 1 to 64"),
        ({"max_queue_delay_s": "0"}, "--max-queue-delay-s: 0.0 is outside 0.05 to 3,600"),
    ],
)
def test_what_autoscaling_refuses(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(flags)
