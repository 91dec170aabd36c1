"""config.json out of a GGUF file's metadata, one function per architecture.

GGUF keeps `<architecture>.<key>`; the keys, and what llama.cpp takes for granted where there is none, are those of
its `convert_hf_to_gguf.py` and of `llama-model.cpp`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from models.store.errors import StoreError
from models.store.gguf_file import GgufFile, GgufTensor

FREQUENCY_TABLE = "rope_freqs.weight"
"""Llama 3's frequency factors: part of the configuration in Hugging Face's layout."""

MAX_SIZE = 1 << 24  # no dimension of a real model comes near
MAX_LAYERS = 1 << 10
MAX_EXPERTS = 1 << 12  # of a layer
MAX_ALL_EXPERTS = 1 << 16
GEMMA3_PATTERN = 6  # five local layers, then a global one
GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose queries are scaled by the width of a head's share, not of a head

# Keys that change what is computed in a way that no architecture here does, and the values that change nothing.
_FOREIGN: dict[str, tuple[bool | int | float, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0, 0.0),
    "expert_gating_func": (1, 0),  # softmax, or not said
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (1.0, 0.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0, 0.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (1.0, 0.0),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What the shapes of the tensors follow from."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # width of one
    inner: int
    vocab: int
    context: int
    experts: int = 0
    expert_inner: int = 0


class Metadata:
    """The pairs of one architecture, by their keys without the prefix."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture: str = file.require("general.architecture", str)

    def error(self, text: str) -> StoreError:
        return StoreError(f"{self.file.path.name}: {text}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        return self.file.get(f"{self.architecture}.{key}", kind, default)

    def size(self, key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        """An integer from 1 to `limit`. Raises StoreError when it is absent, without default, or out of range."""
        name = f"{self.architecture}.{key}"
        value: int = self.file.require(name, int) if default is None else self.file.get(name, int, default)
        if not 1 <= value <= limit:
            raise self.error(f"metadata {name!r} is {value}; 1 to {limit} is possible")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number, as the shortest decimal that rounds to the same float32 (1e-05, not 9.99…e-06)."""
        name = f"{self.architecture}.{key}"
        value = self.file.require(name, float) if default is None else self.file.get(name, float, default)
        if not np.isfinite(value) or value <= 0:
            raise self.error(f"metadata {name!r} is {value}; a positive number is wanted")
        return _short(value)

    def tensor(self, name: str) -> GgufTensor:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise self.error(f"tensor {name!r} is missing")
        return tensor

    def sizes(self) -> Sizes:
        hidden, heads = self.size("embedding_length"), self.size("attention.head_count")
        kv_heads = self.size("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise self.error(f"{heads} attention heads cannot share {kv_heads} key/value heads")
        head = self.size("attention.key_length", max(1, hidden // heads))
        if self.size("attention.value_length", head) != head:
            raise self.error(f"keys of {head} and values of {self.size('attention.value_length')} per head")
        embedding = self.tensor("token_embd.weight")
        if len(embedding.shape) != 2:
            raise self.error(f"tensor 'token_embd.weight' is {list(embedding.shape)}, not a table")
        # Every layer has tensors, so that a count which cannot be true is refused before anything is made of it.
        layers = self.size("block_count", limit=min(MAX_LAYERS, len(self.file.tensors)))
        experts = self.size("expert_count", limit=MAX_EXPERTS) if self.get("expert_count", int, 0) else 0
        if layers * experts > MAX_ALL_EXPERTS:
            raise self.error(f"{layers} layers of {experts} experts; at most {MAX_ALL_EXPERTS} in all are possible")
        return Sizes(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head=head,
            inner=self.size("feed_forward_length"),
            vocab=embedding.shape[0],
            context=self.size("context_length"),
            experts=experts,
            expert_inner=self.size("expert_feed_forward_length", self.size("feed_forward_length")) if experts else 0,
        )


def read_config(file: GgufFile) -> tuple[dict[str, Any], Sizes]:
    """config.json and the sizes of a file of one of CONFIGS' architectures.

    Raises StoreError naming the metadata that is missing, impossible, or means something that is not supported.
    """
    metadata = Metadata(file)
    build = CONFIGS.get(metadata.architecture)
    if build is None:
        raise metadata.error(f"the architecture {metadata.architecture!r} is not supported ({', '.join(CONFIGS)} are)")
    for key, neutral in _FOREIGN.items():
        value = metadata.get(key, type(neutral[0]), neutral[0])
        if value not in neutral:
            raise metadata.error(f"metadata '{metadata.architecture}.{key}' is {value}, which is not supported")
    sizes = metadata.sizes()
    config = build(metadata, sizes)
    config |= {
        "initializer_range": 0.02,
        "tie_word_embeddings": _is_tied(file),
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": sizes.vocab,
    }
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        # None is written as null: a field that is not there means the family's default.
        config[name] = file.get(f"tokenizer.ggml.{key}_token_id", int)
    return config, sizes


def _is_tied(file: GgufFile) -> bool:
    """Whether the head is the embedding: there is none, or (older GPT-2 files) it is a copy."""
    head, embedding = file.tensors.get("output.weight"), file.tensors["token_embd.weight"]
    if head is None:
        return True
    if (head.format, head.shape) != (embedding.format, embedding.shape):
        return False
    return bool((head.data[:4096] == embedding.data[:4096]).all() and np.array_equal(head.data, embedding.data))


def _decoder(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    """What all but the GPTs have."""
    rotary = metadata.size("rope.dimension_count", sizes.head)
    if rotary != sizes.head:
        raise metadata.error(f"partial rotary embedding ({rotary} of {sizes.head}) is not supported")
    if sizes.head % 2:
        raise metadata.error(f"heads of {sizes.head} cannot be rotated: an even number is wanted")
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": sizes.head,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "max_position_embeddings": sizes.context,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": _rope_scaling(metadata, sizes),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
    }


def _llama(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    """Llama, and those that llama.cpp files under it: Mistral (known by its window) and Mixtral (by its experts)."""
    config = _decoder(metadata, sizes)
    window = metadata.get("attention.sliding_window", int, 0)
    if window:
        config["sliding_window"] = metadata.size("attention.sliding_window")
    if sizes.experts:
        return config | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": sizes.experts,
            "num_experts_per_tok": metadata.size("expert_used_count", limit=sizes.experts),
        }
    if window:
        return config | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in metadata.file.tensors,
    }


def _qwen2(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    config = _decoder(metadata, sizes)
    del config["attention_bias"]  # it always has biases of q, k and v
    del config["head_dim"]
    if sizes.head * sizes.heads != sizes.hidden:
        raise metadata.error(f"{sizes.heads} heads of {sizes.head} are not the width {sizes.hidden}")
    return config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def _qwen3(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    config = _decoder(metadata, sizes)
    return config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}


def _qwen3_moe(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    if not sizes.experts:
        raise metadata.error(f"metadata '{metadata.architecture}.expert_count' is missing")
    return _decoder(metadata, sizes) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.expert_inner,
        "norm_topk_prob": metadata.get("expert_weights_norm", bool, True),  # llama.cpp takes it for granted
        "num_experts": sizes.experts,
        "num_experts_per_tok": metadata.size("expert_used_count", limit=sizes.experts),
        "use_sliding_window": False,
    }


def _gemma3(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    config = _decoder(metadata, sizes)
    config["rope_theta"] = metadata.number("rope.freq_base", 1_000_000.0)
    del config["hidden_act"]
    window = metadata.get("attention.sliding_window", int, 0)
    pattern = GEMMA3_PATTERN if window else 1
    cap = metadata.get("final_logit_softcapping", float, 0.0)
    is_wide = sizes.layers == GEMMA3_27B_LAYERS
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": metadata.number("final_logit_softcapping") if cap else None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(sizes.layers)
        ],
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if is_wide else sizes.head,
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10000.0),
        "sliding_window": metadata.size("attention.sliding_window", sizes.context),
        "sliding_window_pattern": pattern,
    }


def _gpt2(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    if sizes.head * sizes.heads != sizes.hidden or sizes.kv_heads != sizes.heads:
        raise metadata.error(f"{sizes.heads} heads of {sizes.head} are not the width {sizes.hidden}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "n_embd": sizes.hidden,
        "n_head": sizes.heads,
        "n_inner": sizes.inner,
        "n_layer": sizes.layers,
        "n_positions": sizes.context,
    }


def _gpt_neox(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    if sizes.head * sizes.heads != sizes.hidden or sizes.kv_heads != sizes.heads:
        raise metadata.error(f"{sizes.heads} heads of {sizes.head} are not the width {sizes.hidden}")
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "attention_bias": True,
        "hidden_act": "gelu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "max_position_embeddings": sizes.context,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "rope_scaling": _rope_scaling(metadata, sizes),
        "rotary_emb_base": metadata.number("rope.freq_base", 10000.0),
        "rotary_pct": metadata.size("rope.dimension_count", sizes.head, limit=sizes.head) / sizes.head,
        "use_parallel_residual": metadata.get("use_parallel_residual", bool, True),
    }


CONFIGS: dict[str, Callable[[Metadata, Sizes], dict[str, Any]]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3moe": _qwen3_moe, "gemma3": _gemma3, "gpt2": _gpt2,
    "gptneox": _gpt_neox,
}  # fmt: skip
"""By `general.architecture`."""


def _rope_scaling(metadata: Metadata, sizes: Sizes) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", str, "none")
    factor = metadata.get("rope.scaling.factor", float, metadata.get("rope.scale_linear", float, 0.0))
    if FREQUENCY_TABLE in metadata.file.tensors:
        if metadata.architecture != "llama" or kind != "none":
            raise metadata.error(f"the table {FREQUENCY_TABLE!r} with rope scaling {kind!r} is not supported")
        return _llama3_scaling(metadata, sizes)
    match kind:
        case "none" if not factor or factor == 1.0:
            return None
        case "linear" | "none":  # files older than the key `type` have the factor alone
            return {"rope_type": "linear", "factor": _positive(metadata, factor)}
        case "yarn":
            return _yarn_scaling(metadata, _positive(metadata, factor))
    raise metadata.error(f"rope scaling {kind!r} is not supported")


def _yarn_scaling(metadata: Metadata, factor: float) -> dict[str, Any]:
    """YaRN (Peng et al. 2023). The optional constants are there when the original configuration had them."""
    if metadata.get("rope.scaling.yarn_ext_factor", float, 1.0) != 1.0:
        raise metadata.error("metadata 'rope.scaling.yarn_ext_factor' is not 1, which is not supported")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
    }
    for name, key in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
        if metadata.get(f"rope.scaling.yarn_{key}", float) is not None:
            scaling[name] = metadata.number(f"rope.scaling.yarn_{key}")
    return scaling


def _llama3_scaling(metadata: Metadata, sizes: Sizes) -> dict[str, Any]:
    """The rope scaling whose factors the file tabulates.

    The table only holds the resulting divisors, so the published parameters of Llama 3.1 and 3.2 are tried.
    Raises StoreError when they do not reproduce it.
    """
    divisors = metadata.tensor(FREQUENCY_TABLE).to_float32().reshape(-1)
    theta = metadata.number("rope.freq_base", 10000.0)
    factor = _positive(metadata, float(divisors.max()))
    low, high, context = 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, sizes.head, 2) / sizes.head)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    wanted = 1.0 / ((1 - smooth) / factor + smooth)
    if divisors.shape != wanted.shape or not np.allclose(divisors, wanted, rtol=1e-3):
        raise metadata.error(f"the table {FREQUENCY_TABLE!r} is not Llama 3's; pull the Hugging Face folder instead")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _positive(metadata: Metadata, factor: float) -> float:
    if not np.isfinite(factor) or factor <= 0:
        raise metadata.error(f"a rope scaling factor of {factor}; a positive number is wanted")
    return _short(factor)


def _short(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
