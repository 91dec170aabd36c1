"""Tiny Llama checkpoints as GGUF files, written by ggml's own writer, and as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

Float = npt.NDArray[np.float32]

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_weights(*, tied: bool = True, seed: int = 0) -> dict[str, Float]:
    """Random weights under Hugging Face's names, float32."""
    random = np.random.default_rng(seed)
    keys = KV_HEADS * HEAD_DIM
    block = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {name: random.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in shapes.items()}


def to_gguf_names(weights: Mapping[str, Float]) -> dict[str, Float]:
    """Names and layout as llama.cpp's converter writes them: query and key rows interleaved per head."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{hf}.weight": f"blk.{layer}.{name}.weight" for name, hf in BLOCK_NAMES.items()}
    result = {}
    for name, weight in weights.items():
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                weight = weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        result[names[name]] = weight
    return result


def write_gguf(
    path: Path,
    tensors: Mapping[str, Float] | None = None,
    *,
    kind: str = "F32",
    kinds: Mapping[str, str] | None = None,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tokens: list[str] | None = None,
    max_part_tensors: int = 0,
) -> Path:
    """One GGUF file. kind: format of all matrices; kinds: of single tensors; metadata: pairs to add or replace,
    None removes one. max_part_tensors: cut it into files of so many; the first is returned."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=max_part_tensors)
    pairs: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **(metadata or {}),
    }
    for key, value in pairs.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
    tokens = TOKENS if tokens is None else tokens
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    for name, weight in (to_gguf_names(make_weights()) if tensors is None else tensors).items():
        is_matrix = weight.ndim > 1 and "ffn_gate_inp" not in name  # routers are never quantised
        chosen = (kinds or {}).get(name, kind if is_matrix else "F32")
        quantisation = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(name, gguf.quants.quantize(weight, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"), default=path) if max_part_tensors else path


def write_folder(folder: Path, **config: Any) -> Path:
    """A Hugging Face folder that is just enough to be accepted; config: fields of config.json to add."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, folder / "model.safetensors")
    return folder


def write_vocabulary(folder: Path, **settings: Any) -> None:
    """GPT-2's two files for TOKENS, as its tokenizer was published; settings: of tokenizer_config.json."""
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    special = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[0], "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **settings}))
