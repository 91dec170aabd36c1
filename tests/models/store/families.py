"""Tiny models of every family, built by transformers and written to GGUF as llama.cpp's converter does it.

Names come from ggml's own table; what the converter does to values is done here a second time, forwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.models.store.world import write_gguf

Float = npt.NDArray[np.float32]

VOCAB = 288  # more rows than the tokenizer has tokens
LAYERS = 2
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_WIDE = {**_SIZES, "head_dim": 32}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_WIDE),
    "llama with biases": LlamaConfig(**_WIDE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama stretched": LlamaConfig(**_WIDE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}),
    "mistral": MistralConfig(**_WIDE, sliding_window=8),
    "mixtral": MixtralConfig(**_WIDE, num_local_experts=3, num_experts_per_tok=2, sliding_window=None),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2 stretched": Qwen2Config(
        **_SIZES,
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6,
        },
    ),
    "qwen3": Qwen3Config(**_WIDE),
    "qwen3moe": Qwen3MoeConfig(
        **_WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "gemma3": Gemma3TextConfig(
        **{**_WIDE, "num_hidden_layers": 7}, sliding_window=8, query_pre_attn_scalar=32, final_logit_softcapping=20.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=LAYERS, n_head=4, n_positions=128, n_inner=96, vocab_size=VOCAB, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt2 with a copied head": GPT2Config(
        n_embd=64, n_layer=LAYERS, n_head=4, n_positions=128, vocab_size=VOCAB, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    ),
    "gptneox": GPTNeoXConfig(
        **{name: value for name, value in _SIZES.items() if name != "num_key_value_heads"},
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    ),
}  # fmt: skip


def write_original(name: str, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A random model of the family, its values exact in bf16, saved by transformers: (model, saved tensors)."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases that would do nothing
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(folder)
    return model.eval(), load_file(folder / "model.safetensors")


def write_family(
    name: str,
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    kind: str = "BF16",
    kinds: dict[str, str] | None = None,
) -> Path:
    """The tensors, under Hugging Face's names, as a GGUF file of the family.

    kind: format of the matrices; kinds: of single tensors, by ggml's names.
    """
    config = CONFIGS[name]
    architecture = {"mistral": "llama", "mixtral": "llama"}.get(config.model_type, name.split(maxsplit=1)[0])
    stored = _converted(name, config, {key: value.float().numpy() for key, value in tensors.items()})
    if "copied head" in name:
        stored["output.weight"] = stored["token_embd.weight"]
    pairs = {f"{architecture}.{key}": value for key, value in _metadata(architecture, config).items()}
    return write_gguf(path, stored, architecture=architecture, metadata=pairs, kind=kind, kinds=kinds)


def _converted(name: str, config: PreTrainedConfig, tensors: dict[str, Float]) -> dict[str, Float]:
    architecture = {"mistral": "llama", "mixtral": "llama"}.get(config.model_type, name.split(maxsplit=1)[0])
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    result: dict[str, Float] = {}
    experts: dict[str, list[Float]] = {}
    for key, value in tensors.items():
        part = key.split(".")[-2]
        if config.model_type in ("llama", "mistral", "mixtral") and part in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            value = np.stack([_interleaved(head) for head in np.split(value, heads)]).reshape(value.shape)
        if config.model_type == "gemma3_text" and key.endswith("norm.weight"):
            value = value + np.float32(1)
        if config.model_type == "gpt2" and part in ("c_attn", "c_proj", "c_fc") and value.ndim == 2:
            value = value.T
        if part == "query_key_value":
            heads = np.split(value, config.num_attention_heads)
            value = np.concatenate([np.concatenate([np.split(head, 3)[i] for head in heads]) for i in range(3)])
        if ".experts." in key:
            before, _, after = key.partition(".experts.")
            # As the converter calls them when it has stacked them.
            merged = f"{before}.experts.{after.split('.', 1)[1]}".removeprefix("model.")
            if config.model_type == "mixtral":
                merged = merged.replace("block_sparse_moe", "feed_forward")
            else:
                merged = f"model.{merged}"
            experts.setdefault(merged, []).append(value)
            continue
        result[_named(names, key)] = np.ascontiguousarray(value)
    return result | {_named(names, key): np.stack(values) for key, values in experts.items()}


def _named(names: gguf.TensorNameMap, key: str) -> str:
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert found is not None, key
    return str(found)


def _interleaved(head: Float) -> Float:
    """Row i of the first half beside row i of the second."""
    first, second = np.split(head, 2)
    return np.stack([row for pair in zip(first, second, strict=True) for row in pair])


def _metadata(architecture: str, config: PreTrainedConfig) -> dict[str, Any]:
    """What the converter writes for the family; names are under the architecture's prefix."""
    text: Any = config
    pairs: dict[str, Any] = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "attention.head_count": text.num_attention_heads,
        "feed_forward_length": getattr(text, "n_inner", None)
        or getattr(text, "intermediate_size", 4 * text.hidden_size),
    }
    if architecture in ("gpt2", "gptneox"):
        pairs["attention.layer_norm_epsilon"] = getattr(text, "layer_norm_eps", None) or text.layer_norm_epsilon
        if architecture == "gptneox":
            pairs["rope.dimension_count"] = int(16 * text.rope_parameters["partial_rotary_factor"])
            pairs["use_parallel_residual"] = text.use_parallel_residual
        return pairs
    pairs |= {
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
    }
    if getattr(text, "head_dim", None):
        pairs |= {"attention.key_length": text.head_dim, "attention.value_length": text.head_dim}
    if architecture == "llama":
        pairs["rope.dimension_count"] = text.head_dim
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    pairs["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] != "default":
        pairs |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        pairs["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if getattr(text, "sliding_window", None):
        pairs["attention.sliding_window"] = text.sliding_window
    if getattr(text, "final_logit_softcapping", None):
        pairs["final_logit_softcapping"] = text.final_logit_softcapping
    if getattr(text, "num_experts_per_tok", None):
        pairs |= {"expert_count": text.num_local_experts, "expert_used_count": text.num_experts_per_tok}
    if getattr(text, "moe_intermediate_size", None):
        pairs["expert_feed_forward_length"] = text.moe_intermediate_size
    return pairs
