"""Llama checkpoints in GGUF: configuration, names and layout as Hugging Face has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from models.store.errors import StoreError
from models.store.gguf_file import GgufFile, GgufTensor

Float = npt.NDArray[np.float32]

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
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
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.weight")
_TABLE = "rope_freqs.weight"  # Llama 3's frequency factors: part of the configuration in Hugging Face's layout


def config(file: GgufFile) -> dict[str, Any]:
    """config.json of a `LlamaForCausalLM`. Raises StoreError naming the metadata that is missing."""
    hidden_size = file.require("llama.embedding_length", int)
    heads = file.require("llama.attention.head_count", int)
    kv_heads = file.get("llama.attention.head_count_kv", int, heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise StoreError(f"{file.path.name}: {heads} attention heads cannot share {kv_heads} key/value heads")
    head_dim = file.get("llama.attention.key_length", int, hidden_size // heads)
    if file.get("llama.rope.dimension_count", int, head_dim) != head_dim:
        raise StoreError(f"{file.path.name}: partial rotary embedding is not supported")
    if file.get("llama.expert_count", int, 0):
        raise StoreError(f"{file.path.name}: mixture-of-experts checkpoints are not supported")
    if file.get("llama.rope.scaling.type", str, "none") != "none":
        raise StoreError(
            f"{file.path.name}: rope scaling {file.metadata['llama.rope.scaling.type']!r} is not supported"
        )
    theta = _short(file.get("llama.rope.freq_base", float, 10000.0))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise StoreError(f"{file.path.name}: tensor 'token_embd.weight' is missing")
    result: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": file.require("llama.feed_forward_length", int),
        "max_position_embeddings": file.require("llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": file.require("llama.block_count", int),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": _short(file.require("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_scaling": _llama3_scaling(file, theta, head_dim),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": embedding.shape[0],
    }
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        index = file.get(f"tokenizer.ggml.{key}_token_id", int)
        if index is not None:
            result[name] = index
    return result


def tensors(file: GgufFile, config: dict[str, Any]) -> list[tuple[str, tuple[int, ...], Callable[[], Float]]]:
    """(Hugging Face name, shape, reader) of every tensor, in the order in which they lie in the file.

    Raises StoreError when a tensor is missing, unknown or has another shape than the configuration says.
    """
    expected = _expected(config)
    found: list[tuple[str, tuple[int, ...], Callable[[], Float]]] = []
    for tensor in file.tensors.values():
        if tensor.name == _TABLE:
            continue
        name = _name(tensor.name)
        shape = None if name is None else expected.pop(name, None)
        if name is None or shape is None:
            raise StoreError(f"{file.path.name}: tensor {tensor.name!r} is not part of a Llama model as configured")
        if tensor.shape != shape:
            raise StoreError(f"{file.path.name}: tensor {tensor.name!r} is {list(tensor.shape)}, not {list(shape)}")
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        found.append((name, shape, _reader(tensor, heads.get(name.split(".")[-2]))))
    if expected:
        raise StoreError(f"{file.path.name}: {len(expected)} tensors are missing, the first for {min(expected)!r}")
    return found


def _reader(tensor: GgufTensor, heads: int | None) -> Callable[[], Float]:
    if heads is None:
        return tensor.to_float32
    return lambda: halves(tensor.to_float32(), heads)


def halves(weight: Float, heads: int) -> Float:
    """Undo llama.cpp's permutation of query and key rows.

    weight: [heads * head_dim, in]. llama.cpp rotates neighbouring rows (2i, 2i+1), Hugging Face rows
    (i, i + head_dim / 2), so its converter interleaves the two halves of each head; here they part again.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _name(name: str) -> str | None:
    if name in _WHOLE:
        return _WHOLE[name]
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"


def _expected(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The rope scaling whose factors the file tabulates, None without a table.

    The table only holds the resulting divisors, so the published parameters of Llama 3.1 and 3.2 are tried.
    Raises StoreError when they do not reproduce it.
    """
    table = file.tensors.get(_TABLE)
    if table is None:
        return None
    divisors = table.to_float32().reshape(-1)
    factor = _short(float(divisors.max()))
    low, high, context = 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    wanted = 1.0 / ((1 - smooth) / factor + smooth)
    if divisors.shape != wanted.shape or not np.allclose(divisors, wanted, rtol=1e-3):
        raise StoreError(
            f"{file.path.name}: the table {_TABLE!r} is not Llama 3's; pull the Hugging Face folder instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _short(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
