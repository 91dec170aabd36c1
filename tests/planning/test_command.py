"""`argosy plan` from the command line: tables, JSON, exit codes, and references of every kind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from models.store.manifest import MANIFEST
from models.store.sources import ALIASES
from serving.cli import app
from serving.planning.command import FITS, NOTHING_FITS, run
from serving.planning.demand import PlanError
from serving.planning.quantities import parse_bandwidth, parse_rate, shown_bandwidth, shown_bytes
from serving.planning.shapes import SHAPES
from tests.tiny import tiny_llama


def plan(model: str | None, store: Path = Path("/nowhere"), width: int = 120, **flags: str) -> tuple[int, str]:
    text = io.StringIO()
    code = run(model, flags, store, Console(file=text, width=width))
    return code, text.getvalue()


def plan_json(model: str, store: Path = Path("/nowhere"), **flags: str) -> dict[str, Any]:
    _, text = plan(model, store, output="json", **flags)
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_exit_code_says_whether_something_fits() -> None:
    terminal = CliRunner()
    done = terminal.invoke(app, ["plan", "gpt3-175b", "--gpus", "16", "-o", "json"])
    assert done.exit_code == FITS
    assert json.loads(done.stdout)["model"]["parameters"] == 174_604_259_328
    done = terminal.invoke(app, ["plan", "gpt3-175b"])
    assert done.exit_code == NOTHING_FITS
    assert "Nothing fits" in done.stdout
    done = terminal.invoke(app, ["plan", "gpt3-176b"])
    assert done.exit_code == 2
    assert "no model 'gpt3-176b'" in done.stderr


def test_json_has_the_same_keys_whatever_fits() -> None:
    keys = ["version", "model", "demand", "machine", "fits", "placements", "refused", "assumptions"]
    one, many = plan_json("gpt3-175b"), plan_json("gpt3-175b", gpus="16")
    assert list(one) == list(many) == keys
    assert (one["fits"], one["placements"], many["fits"]) == (False, [], True)
    assert list(many["placements"][0]) == [
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "replicas",
        "idle_gpus",
        "weight_bytes",
        "fullest_rank",
        "tightest_rank",
        "kv_tokens",
        "contexts",
        "total_tokens_s",
        "decode",
        "prefill",
    ]
    assert list(one["refused"][0]) == ["tensor_parallel_size", "pipeline_parallel_size", "reason", "missing_bytes"]
    assert one["demand"]["context"] == 2048  # the model's limit


def test_tables_say_what_json_says() -> None:
    code, text = plan("llama-3.1-70b", gpus="8", context="4096")
    found = plan_json("llama-3.1-70b", gpus="8", context="4096")
    assert code == FITS
    assert "70,553,706,496 parameters" in text
    for placement in found["placements"]:
        assert f"{placement['kv_tokens']:,}" in text
        assert f"{placement['contexts']:,}" in text
    for assumption in found["assumptions"]:
        assert assumption in text
    for refusal in found["refused"]:
        assert refusal["reason"][:40] in text


@pytest.mark.parametrize("name", ["gpt3-175b", "qwen3-235b-a22b", "smollm2-135m"])
def test_tables_fit_into_eighty_columns(name: str) -> None:
    for flags in ({"gpus": "16", "gpu": "h200-141gb"}, {"gpus": "1024", "max_num_seqs": "512", "context": "100"}):
        assert "…" not in plan(name, width=80, **flags)[1]
    assert "…" not in plan(None, width=80)[1]


def test_everything_that_is_assumed_is_said() -> None:
    def said(model: str, **flags: str) -> str:
        return " ".join(plan_json(model, **flags)["assumptions"])

    assert "3.00 TB/s (measured)" in said("llama-3.1-8b")
    assert "2.04 TB/s (published)" in said("llama-3.1-8b", gpu="a100-80gb")
    assert "1.00 TB/s (given)" in said("llama-3.1-8b", bandwidth="1TB/s")
    assert "not counted" in said("llama-3.1-8b", gpu="cpu")
    assert "held twice" in said("gpt2")
    assert "width of the bands was not published" in said("gpt3-125m")
    assert "choose experts evenly" in said("mixtral-8x7b")
    assert "keep the whole context" in said("gemma-3-1b")
    assert "what-if" in said("gpt2", kv_dtype="float32")
    assert "offset per 32 inputs" in said("gpt2", quantization="int4")


def test_without_a_model_the_names_are_listed() -> None:
    code, text = plan(None)
    assert code == FITS
    for name in (*SHAPES, "h200-141gb", "cpu"):
        assert name in text


def test_flags_replace_the_ceilings() -> None:
    own = plan_json("llama-3.1-8b", memory="40GB", bandwidth="1TB/s", flops="100T")
    assert own["machine"]["accelerator"]["name"] == "device"
    assert own["machine"]["accelerator"]["memory_bytes"] == {"value": 40e9, "source": "given"}
    one = own["placements"][0]["decode"][0]["inter_token_s"]
    twice = plan_json("llama-3.1-8b", memory="40GB", bandwidth="2TB/s", flops="100T")["placements"][0]["decode"][0]
    assert one == pytest.approx(2 * twice["inter_token_s"])
    more = plan_json("llama-3.1-8b", gpu="l4", memory="48GB")
    assert more["machine"]["accelerator"]["bandwidth"]["source"] == "published"
    assert plan_json("llama-3.1-8b", gpu="l4", context="65536")["fits"] is False
    assert more["fits"] is True
    link = plan_json("llama-3.1-8b", gpus="2", link="1GB/s")
    assert link["machine"]["accelerator"]["link"] == {"value": 1e9, "source": "given"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"gpu": "h1000"}, "--gpu must be one of .*; got 'h1000'"),
        ({"memory": "0GB"}, "--memory: must be above 0; got '0GB'"),
        ({"memory": "much"}, "--memory: expected a size such as .*; got 'much'"),
        ({"bandwidth": "3TB/h"}, "--bandwidth: expected bytes per second such as .*; got '3TB/h'"),
        ({"flops": "fast"}, "--flops: expected operations per second such as .*; got 'fast'"),
        ({"link": "0"}, "--link: must be above 0; got '0'"),
        ({"gpus": "0"}, "--gpus must be a whole number from 1 to 16384; got '0'"),
        ({"gpus_per_node": "-1"}, "--gpus-per-node must be a whole number .*; got '-1'"),
        ({"context": "9" * 30}, "--context must be a whole number"),
        ({"context": "3000"}, "--context must be from 1 to the model's 2048 positions; got 3000"),
        ({"dtype": "fp4"}, "--dtype must be one of bfloat16, float16, float32; got 'fp4'"),
        ({"quantization": "int3"}, "--quantization must be one of auto, none, int8, int4; got 'int3'"),
        ({"kv_dtype": "int8"}, "--kv-dtype must be one of .*; got 'int8'"),
        ({"output": "xml"}, "--output must be one of table, json; got 'xml'"),
    ],
)
def test_what_is_refused(flags: dict[str, str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan("gpt3-125m", **flags)


def test_a_cpu_is_a_whole_machine() -> None:
    """Two ranks of it have its memory once, so they are two machines or a plan of half the memory."""
    found = plan_json("gpt3-125m", gpu="cpu", gpus="2", memory="8GB")
    sizes = {(p["tensor_parallel_size"], p["pipeline_parallel_size"]) for p in found["placements"]}
    assert sizes == {(1, 1), (1, 2)}
    assert any("within a node, which has 1" in refusal["reason"] for refusal in found["refused"])
    halves = plan_json("gpt3-125m", gpu="cpu", gpus="2", gpus_per_node="2", memory="4GB")
    assert (2, 1) in {(p["tensor_parallel_size"], p["pipeline_parallel_size"]) for p in halves["placements"]}


def test_folders_and_files(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    by_folder = plan_json(str(folder), gpu="cpu", memory="2GB")
    by_file = plan_json(str(folder / "config.json"), gpu="cpu", memory="2GB")
    assert by_folder["model"]["parameters"] == by_file["model"]["parameters"]
    assert by_folder["placements"] == by_file["placements"]
    assert by_folder["model"]["max_context"] == 512


def test_what_is_in_the_store_goes_by_its_name(tmp_path: Path) -> None:
    stored = tiny_llama(tmp_path / "kept")
    (stored / MANIFEST).write_text("{}")
    tiny_llama(tmp_path / "owner--name")
    expected = plan_json(str(stored), gpu="cpu", memory="2GB")["placements"]
    assert plan_json("kept", tmp_path, gpu="cpu", memory="2GB")["placements"] == expected
    assert plan_json("owner/name", tmp_path, gpu="cpu", memory="2GB")["placements"] == expected


def test_a_checkpoint_in_int4_stays_so(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, hidden_size=96, intermediate_size=128, num_attention_heads=4, head_dim=32)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "argosy-int4"}})
    )
    assert plan_json(str(folder), gpu="cpu", memory="2GB")["demand"]["quantization"] == "int4"
    with pytest.raises(PlanError, match="--quantization must be auto or int4"):
        plan(str(folder), quantization="none")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nobody/has-this-model", "neither in the store nor in the hub's cache, and nothing is fetched for a plan"),
        ("what is this", "one of the shapes that `argosy plan` lists"),
        ("~nobody-has-this-name/config.json", "one of the shapes that `argosy plan` lists"),
        ("x" * 300 + ".json", "one of the shapes that `argosy plan` lists"),
        ("", "a model reference has 1 to 4096 characters"),
    ],
)
def test_references_that_lead_nowhere(reference: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        plan(reference, tmp_path)


def test_configurations_that_cannot_be_computed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, words in (
        ('{"model_type": "rwkv"}', "model_type 'rwkv' is not one of"),
        ("[]", "config.json"),
        ("{", "config.json"),
        (json.dumps({**SHAPES["gpt2"], "n_head": 7}), "n_embd must be a multiple of n_head"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=words):
            plan(str(path))


def test_the_default_models_alias(tmp_path: Path) -> None:
    """Before it is pulled, from its GGUF file's metadata."""
    assert "smollm2-135m-instruct" in ALIASES
    found = plan_json("smollm2-135m-instruct", tmp_path, gpu="cpu", memory="8GB")
    assert found["model"]["parameters"] == 134_515_008
    assert list(tmp_path.iterdir()) == []


def test_amounts() -> None:
    assert parse_bandwidth("3.0TB/s") == parse_bandwidth("3000GB") == 3e12
    assert parse_rate("798T") == parse_rate("798 TFLOPS") == 798e12
    assert parse_rate("1.2PFLOP/s") == 1.2e15
    assert [shown_bytes(n) for n in (999, 1e3, 22.04e9, 350.4e9)] == ["999 B", "1.00 kB", "22.0 GB", "350 GB"]
    assert shown_bandwidth(3.35e12) == "3.35 TB/s"
