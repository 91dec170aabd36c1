"""A GGUF file becomes the Hugging Face folder that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from models.registry import load_config
from models.store import StoreError
from models.store.convert import convert_gguf
from tests.models.store.world import HEAD_DIM, SPECIAL, TOKENS, make_weights, to_gguf_names, write_gguf


def convert(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Convert and read the weights."""
    folder.mkdir()
    convert_gguf(source, folder, lambda done, total: None)
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return weights


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_format_gives_the_weights_that_were_written(tmp_path: Path, kind: str) -> None:
    weights = make_weights()
    found = convert(write_gguf(tmp_path / "m.gguf", to_gguf_names(weights), kind=kind), tmp_path / "out")

    assert set(found) == set(weights)
    for name, weight in weights.items():
        # Rows are permuted whole and blocks lie within rows: quantising commutes with the permutation.
        format = GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        wanted = torch.from_numpy(np.array(dequantize(quantize(weight, format), format))).reshape(weight.shape)
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], wanted.to(torch.bfloat16)), name


def test_four_bits_with_a_minimum_stay_within_half_a_step(tmp_path: Path) -> None:
    weights = make_weights()
    found = convert(write_gguf(tmp_path / "m.gguf", to_gguf_names(weights), kind="Q4_1"), tmp_path / "out")

    name = "model.layers.1.mlp.up_proj.weight"
    blocks = weights[name].reshape(-1, 32)
    step = (blocks.max(1) - blocks.min(1)) / 15
    error = np.abs(found[name].float().numpy().reshape(-1, 32) - blocks).max(1)
    assert (error <= step * 0.5 + 0.005).all()
    assert error.max() > 0


@pytest.mark.filterwarnings("ignore")  # transformers' own GGUF reader
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_tensors_from_the_gguf_file(tmp_path: Path, tied: bool) -> None:
    """The permutation of query and key rows against an implementation that is not ours."""
    source = write_gguf(tmp_path / "m.gguf", to_gguf_names(make_weights(tied=tied)), kind="Q8_0")
    found = convert(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    load: Any = load_gguf_checkpoint
    theirs = load(str(source), return_tensors=True, model_to_load=model)["tensors"]
    assert set(theirs) == set(found)
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name].bfloat16()), name


def test_the_converted_model_computes_what_the_original_does(tmp_path: Path) -> None:
    weights = make_weights(tied=False)
    convert(write_gguf(tmp_path / "m.gguf", to_gguf_names(weights), kind="BF16"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(0, 200, 7)[None]
    with torch.inference_mode():
        found = model(ids).logits
        rounded = {name: torch.from_numpy(weight).bfloat16().float() for name, weight in weights.items()}
        model.load_state_dict(rounded)
        assert torch.equal(found, model(ids).logits)
        model.load_state_dict(
            {name: tensor.roll(1, 0) if "k_proj" in name else tensor for name, tensor in rounded.items()}
        )
        assert not torch.allclose(found, model(ids).logits, atol=1e-3)  # the comparison does see a wrong order


def test_the_configuration_says_what_the_metadata_said(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")

    config = read(tmp_path / "out" / "config.json")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (64, 96, 2)
    assert config["vocab_size"] == len(TOKENS)
    assert config["rms_norm_eps"] == 1e-5  # not the float32's 9.999999747378752e-06
    assert config["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is True
    assert read(tmp_path / "out" / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2}


def test_special_tokens_that_a_file_does_not_have_are_none(tmp_path: Path) -> None:
    """And not the family's, which a config that is silent would mean."""
    file = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": None})
    convert(file, tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] is None
    assert load_config(tmp_path / "out").eos_token_ids == ()


def test_llama_3_frequency_factors_become_rope_scaling(tmp_path: Path) -> None:
    theta, factor = 500000.0, 32.0
    wavelength = 2 * np.pi * theta ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    table = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    pairs = {"llama.rope.freq_base": theta}
    tensors = to_gguf_names(make_weights()) | {"rope_freqs.weight": table}
    found = convert(write_gguf(tmp_path / "m.gguf", tensors, metadata=pairs), tmp_path / "out")

    assert read(tmp_path / "out" / "config.json")["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert set(found) == set(make_weights())

    other = tensors | {"rope_freqs.weight": table + np.linspace(0, 1, len(table), dtype=np.float32)}
    with pytest.raises(StoreError, match="is not Llama 3's"):
        convert(write_gguf(tmp_path / "n.gguf", other, metadata=pairs), tmp_path / "other")


def test_a_model_in_several_files_is_one_model(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", max_part_tensors=7)
    assert first.name == "m-00001-of-00003.gguf"
    whole = convert(write_gguf(tmp_path / "whole.gguf"), tmp_path / "a")
    parts = convert(first, tmp_path / "b")
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)

    second, third = (tmp_path / f"m-0000{number}-of-00003.gguf" for number in (2, 3))
    with pytest.raises(StoreError, match="part 2 of 3; give the first"):
        convert(second, tmp_path / "c")
    second.rename(tmp_path / "aside")
    with pytest.raises(StoreError, match=r"00002-of-00003\.gguf: cannot be read: No such file"):
        convert(first, tmp_path / "d")
    second.write_bytes(third.read_bytes())
    with pytest.raises(StoreError, match="not part 2 of 3"):
        convert(first, tmp_path / "e")


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    ids = tokenizer("hello world 12<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer.decode(ids) == "hello world 12<|im_end|>"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'S", "1234", " x"]),
        ("smollm", ["it", "'S", "1", "2", "3", "4", " x"]),
        ("llama-bpe", ["it", "'S", "123", "4", " x"]),
        ("qwen2", ["it", "'S", "1", "2", "3", "4", " x"]),
    ],
)
def test_splitting_rules(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    source = write_gguf(
        tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    )
    convert(source, tmp_path / "out")
    splitter: Any = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
    text = "it'S1234 x"
    found = [text[begin:end] for _, (begin, end) in splitter.pre_tokenize_str(text)]
    if pre in ("gpt-2", "smollm"):  # these know contractions in lower case only
        pieces = [*pieces[:1], "'", "S", *pieces[2:]]
    assert found == pieces


def test_a_beginning_of_sequence_is_added_when_the_file_says_so(tmp_path: Path) -> None:
    pairs = {"tokenizer.ggml.add_bos_token": True}
    convert(write_gguf(tmp_path / "m.gguf", metadata=pairs), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("h")["input_ids"][0] == 1
    assert len(tokenizer("h")["input_ids"]) == 2
    assert len(tokenizer("h", add_special_tokens=False)["input_ids"]) == 1


def drop(name: str) -> dict[str, Any]:
    return {"tensors": {key: value for key, value in to_gguf_names(make_weights()).items() if key != name}}


def swap(name: str, value: Any) -> dict[str, Any]:
    return {"tensors": to_gguf_names(make_weights()) | {name: value}}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "architecture": (lambda: {"architecture": "gemma4"}, "architecture 'gemma4' is not supported"),
    "tokenizer": (lambda: {"metadata": {"tokenizer.ggml.model": "bert"}}, "tokenizer type 'bert'"),
    "splitting": (lambda: {"metadata": {"tokenizer.ggml.pre": "falcon"}}, "splitting rule 'falcon'"),
    "unnamed splitting": (lambda: {"metadata": {"tokenizer.ggml.pre": None}}, "splitting rule 'default'"),
    "duplicate": (lambda: {"tokens": [*TOKENS[:-1], TOKENS[5]]}, "1 duplicate tokens"),
    "bos": (lambda: {"metadata": {"tokenizer.ggml.bos_token_id": 999}}, "bos_token_id is 999"),
    "heads": (lambda: {"metadata": {"llama.attention.head_count_kv": 3}}, "4 attention heads cannot share 3"),
    "missing pair": (lambda: {"metadata": {"llama.block_count": None}}, "'llama.block_count' is missing"),
    "type of pair": (lambda: {"metadata": {"llama.block_count": "2"}}, "'llama.block_count' is a str, not a int"),
    "experts": (lambda: {"metadata": {"llama.expert_count": 8}}, "'llama.expert_used_count' is missing"),
    "partial rotary": (lambda: {"metadata": {"llama.rope.dimension_count": 8}}, "partial rotary"),
    "missing tensor": (lambda: drop("blk.1.attn_k.weight"), "1 tensors are missing, the first 'blk.1.attn_k.weight'"),
    "more layers": (lambda: {"metadata": {"llama.block_count": 1}}, "'blk.1.[a-z_]+.weight' is not part of"),
    "unknown tensor": (lambda: swap("blk.0.attn_sinks", np.zeros(64, np.float32)), "'blk.0.attn_sinks' is not part"),
    "half of the biases": (lambda: swap("blk.0.attn_q.bias", np.zeros(64, np.float32)), "7 tensors are missing"),
    "embedding model": (lambda: {"metadata": {"llama.attention.causal": False}}, "'llama.attention.causal' is False"),
    "unit of attention": (lambda: {"metadata": {"llama.attention.scale": 0.5}}, "'llama.attention.scale' is 0.5"),
    "layers that cannot be": (lambda: {"metadata": {"llama.block_count": 2**31}}, "is 2147483648; 1 to 20 is possible"),
    "experts that cannot be": (lambda: {"metadata": {"llama.expert_count": 10**6}}, "1 to 4096 is possible"),
    "experts of all layers": (
        lambda: {"metadata": {"llama.expert_count": 4096, "llama.block_count": 20}},
        "20 layers of 4096 experts; at most 65536",
    ),
    "odd heads": (
        lambda: {"metadata": {"llama.attention.key_length": 15, "llama.rope.dimension_count": 15}},
        "heads of 15 cannot be rotated",
    ),
    "no heads": (lambda: {"metadata": {"llama.attention.head_count": 0}}, "'llama.attention.head_count' is 0"),
    "epsilon": (
        lambda: {"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}},
        "epsilon' is nan; a positive number is wanted",
    ),
    "scaling": (lambda: {"metadata": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope'"),
    "scaling factor": (lambda: {"metadata": {"llama.rope.scaling.type": "linear"}}, "factor of 0.0"),
    "end of turn": (lambda: {"metadata": {"tokenizer.ggml.eot_token_id": 10**6}}, "eot_token_id is 1000000"),
    "shape": (lambda: swap("output_norm.weight", np.zeros(65, np.float32)), r"is \[65\], not \[64\]"),
    "not finite": (lambda: swap("output_norm.weight", np.full(64, np.nan, np.float32)), "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, name: str) -> None:
    arguments, message = REFUSED[name]
    source = write_gguf(tmp_path / "m.gguf", **arguments())
    with pytest.raises(StoreError, match=message):
        convert(source, tmp_path / "out")
