"""Every architecture: what transformers wrote, through GGUF and back, is what transformers wrote, and we serve it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.ops.select import select_kernels
from models.store import StoreError, convert, pull, resolve, verify
from tests.models.architectures.parity import Case
from tests.models.store.families import CONFIGS, write_family, write_original

IDS = torch.arange(3, 250, 8)[None]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_comes_back_from_gguf(tmp_path: Path, name: str) -> None:
    original, tensors = write_original(name, tmp_path / "original")
    folder = pull(str(write_family(name, tmp_path / "m.gguf", tensors)), store=tmp_path / "store")

    found = load_file(folder / "model.safetensors")
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(found[key].float(), tensor), key
    pulled = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert pulled.config.model_type == CONFIGS[name].model_type
    with torch.inference_mode():
        assert torch.equal(pulled(IDS).logits, original(IDS).logits)
        Case(folder, (2, 40)).assert_parity(select_kernels(torch.device("cpu"), torch.float32), num_shuffles=1)


INT4 = ["llama with biases", "mixtral", "qwen2", "qwen3moe", "gpt2", "gptneox"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", INT4)
def test_a_familys_four_bit_linears_are_kept(tmp_path: Path, name: str, kind: str) -> None:
    """Codes, scales and offsets of every linear mean the values of the quantised weight, in Hugging Face's rows."""
    _, tensors = write_original(name, tmp_path / "original")
    source = write_family(name, tmp_path / "m.gguf", tensors, kind=kind)
    store = tmp_path / "store"
    folder = pull(str(source), store=store, quantization="int4")
    wide = load_file(pull(str(source), store=store) / "model.safetensors")

    kept = load_file(folder / "model.safetensors")
    stems = [key.removesuffix(".codes") for key in kept if key.endswith(".codes")]
    layers = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight") and is_linear(key)}
    assert set(stems) == layers
    for stem in stems:
        codes, scales = kept[f"{stem}.codes"], kept[f"{stem}.scales"].float()
        assert (f"{stem}.offsets" in kept) == (kind == "Q4_1")
        offsets = kept[f"{stem}.offsets"].float() if kind == "Q4_1" else -8 * scales
        values = torch.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1, 32)
        weight = (values * scales[..., None] + offsets[..., None]).reshape(len(codes), -1)
        wanted = wide[f"{stem}.weight"]
        if CONFIGS[name].model_type == "gpt2":
            wanted = wanted.T
        assert torch.equal(weight.bfloat16(), wanted), stem
    for key in wide.keys() - {f"{stem}.weight" for stem in stems}:
        assert torch.equal(kept[key], wide[key])
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "argosy-int4", "group_size": 32}


def is_linear(key: str) -> bool:
    linears = ("_proj.", ".w1.", ".w2.", ".w3.", ".c_", "query_key_value", "attention.dense", "mlp.dense")
    return any(part in key for part in linears)


def test_both_weight_formats_live_side_by_side(tmp_path: Path) -> None:
    _, tensors = write_original("llama", tmp_path / "original")
    store = tmp_path / "store"
    source = str(write_family("llama", tmp_path / "m.gguf", tensors, kind="Q4_1"))
    kept = pull(source, store=store, quantization="int4")
    assert kept == resolve(source, store, "int4")
    assert kept.name == f"{resolve(source, store).name}-int4"
    for quantization in ("auto", "none", "int8"):
        assert pull(source, store=store, quantization=quantization) == resolve(source, store) != kept
    assert pull(kept.name, store=store) == pull(kept.name, store=store, quantization="int4") == kept
    plain = resolve(source, store).name
    assert pull(plain, store=store) == store / plain
    assert pull(plain, store=store, quantization="int4") == kept  # by its name in the store, too
    assert (kept / "model.safetensors").stat().st_size < (resolve(source, store) / "model.safetensors").stat().st_size


def test_a_large_model_becomes_shards_that_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 50_000)
    original, tensors = write_original("mixtral", tmp_path / "original")
    source = str(write_family("mixtral", tmp_path / "m.gguf", tensors))
    folder = pull(source, store=tmp_path / "store")
    shards = sorted(path for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert max(path.stat().st_size for path in shards) < 60_000
    assert not (folder / "model.safetensors").exists()
    verify(folder, deep=True)
    pulled = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(pulled(IDS).logits, original(IDS).logits)
        Case(folder, (2, 40)).assert_parity(select_kernels(torch.device("cpu"), torch.float32), num_shuffles=1)


def test_of_a_mixed_file_those_in_four_bits_are_kept(tmp_path: Path) -> None:
    _, tensors = write_original("llama", tmp_path / "original")
    other = {"blk.0.attn_v.weight": "Q8_0", "blk.1.ffn_down.weight": "Q5_1", "blk.1.ffn_up.weight": "Q4_0"}
    source = str(write_family("llama", tmp_path / "m.gguf", tensors, kind="Q4_1", kinds=other))
    kept = load_file(pull(source, store=tmp_path / "store", quantization="int4") / "model.safetensors")
    wide = load_file(pull(source, store=tmp_path / "store") / "model.safetensors")
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(kept[f"{name}.weight"], wide[f"{name}.weight"])
        assert f"{name}.codes" not in kept
    for name, has_offsets in (("model.layers.1.mlp.up_proj", False), ("model.layers.0.self_attn.k_proj", True)):
        assert f"{name}.codes" in kept
        assert (f"{name}.offsets" in kept) == has_offsets


def test_a_file_with_other_linears_stays_bf16(tmp_path: Path) -> None:
    _, tensors = write_original("llama", tmp_path / "original")
    source = str(write_family("llama", tmp_path / "m.gguf", tensors, kind="Q8_0"))
    folder = pull(source, store=tmp_path / "store", quantization="int4")
    assert folder == resolve(source, tmp_path / "store", "int4") == resolve(source, tmp_path / "store")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_quantising_commutes_with_the_order_of_rows(tmp_path: Path) -> None:
    """Blocks lie within rows: a permuted, fused or split tensor has the values of the quantised original."""
    for name, key in (("llama", "model.layers.1.self_attn.k_proj.weight"), ("gptneox", QKV), ("qwen3moe", EXPERT)):
        _, tensors = write_original(name, tmp_path / name / "original")
        source = write_family(name, tmp_path / name / "m.gguf", tensors, kind="Q5_1")
        found = load_file(pull(str(source), store=tmp_path / "store") / "model.safetensors")
        kind = GGMLQuantizationType.Q5_1
        wanted = torch.from_numpy(np.array(dequantize(quantize(tensors[key].numpy(), kind), kind)))
        assert torch.equal(found[key], wanted.bfloat16())


QKV = "gpt_neox.layers.1.attention.query_key_value.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def test_an_unknown_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    _, tensors = write_original("llama", tmp_path / "original")
    source = write_family("llama", tmp_path / "m.gguf", tensors)
    data = source.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
    source.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"'mamba' is not supported \(llama, qwen2, qwen3, qwen3moe, gemma3, gpt2, gptn"
    ):
        pull(str(source), store=tmp_path / "store")
