"""Models by name: what their published `config.json` says, as far as it decides what they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def _gpt3(n_layer: int, n_embd: int, n_head: int, head_dim: int) -> Config:
    """Table 2.1 of Brown et al. 2020. Heads need not add up to the width there (XL, 13B)."""
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "head_dim": head_dim}
    return {"model_type": "gpt2", **sizes, "n_positions": 2048, "vocab_size": 50257}


def _gpt2(n_layer: int, n_embd: int, n_head: int) -> Config:
    return {"model_type": "gpt2", "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": 50257}


def _opt(num_layers: int, hidden_size: int, num_heads: int, **others: Any) -> Config:
    """Table 1 of Zhang et al. 2022."""
    sizes = {"num_hidden_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": num_heads}
    return {"model_type": "opt", **sizes, "ffn_dim": 4 * hidden_size, "vocab_size": 50272, **others}


def _llama(layers: int, width: int, heads: int, kv_heads: int, inner: int, vocab: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        **others,
    }


def _llama3(layers: int, width: int, heads: int, kv_heads: int, inner: int, **others: Any) -> Config:
    return _llama(layers, width, heads, kv_heads, inner, 128256, max_position_embeddings=131072, **others)


def _smollm2(layers: int, width: int, heads: int, kv_heads: int, inner: int) -> Config:
    longest = {"max_position_embeddings": 8192}
    return _llama(layers, width, heads, kv_heads, inner, 49152, **longest, tie_word_embeddings=True)


def _qwen2(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocab: int, *, is_tied: bool = False
) -> Config:
    others = {"max_position_embeddings": 32768, "tie_word_embeddings": is_tied}
    return {**_llama(layers, width, heads, kv_heads, inner, vocab, **others), "model_type": "qwen2"}


def _qwen3(layers: int, width: int, heads: int, kv_heads: int, inner: int, *, is_tied: bool = False) -> dict[str, Any]:
    others = {"head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": is_tied}
    return {**_llama(layers, width, heads, kv_heads, inner, 151936, **others), "model_type": "qwen3"}


def _qwen3_moe(layers: int, width: int, heads: int, kv_heads: int, inner: int, expert: int) -> Config:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert, "norm_topk_prob": True}
    return {**_qwen3(layers, width, heads, kv_heads, inner), "model_type": "qwen3_moe", **experts}


def _mixtral(layers: int, width: int, heads: int, kv_heads: int, inner: int, longest: int) -> Config:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": longest}
    return {**_llama(layers, width, heads, kv_heads, inner, 32000), "model_type": "mixtral", **experts}


def _gemma3(
    layers: int, width: int, heads: int, kv_heads: int, head_dim: int, inner: int, window: int, vocab: int, longest: int
) -> Config:
    """The language model alone; five layers with a window, then one without."""
    sizes = {"head_dim": head_dim, "sliding_window": window, "sliding_window_pattern": 6}
    others = {"max_position_embeddings": longest, "tie_word_embeddings": True}
    return {**_llama(layers, width, heads, kv_heads, inner, vocab), "model_type": "gemma3_text", **sizes, **others}


SHAPES: dict[str, Config] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt3(12, 768, 12, 64),
    "gpt3-350m": _gpt3(24, 1024, 16, 64),
    "gpt3-760m": _gpt3(24, 1536, 16, 96),
    "gpt3-1.3b": _gpt3(24, 2048, 24, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "num_hidden_layers": 44,
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "vocab_size": 50432,
    },
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192),
    "llama-3.1-8b": _llama3(32, 4096, 32, 8, 14336),
    "llama-3.1-70b": _llama3(80, 8192, 64, 8, 28672),
    "llama-3.1-405b": _llama3(126, 16384, 128, 8, 53248),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8, 8192, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8, 8192, tie_word_embeddings=True),
    "mistral-7b": {**_llama(32, 4096, 32, 8, 14336, 32768, max_position_embeddings=32768), "model_type": "mistral"},
    "mixtral-8x7b": _mixtral(32, 4096, 32, 8, 14336, 32768),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 8, 16384, 65536),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, 151936, is_tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-72b": _qwen2(80, 8192, 64, 8, 29568, 152064),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, is_tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 8, 6144, is_tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 8, 9728, is_tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 8, 17408),
    "qwen3-32b": _qwen3(64, 5120, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 4, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 4, 12288, 1536),
    "gemma-3-1b": _gemma3(26, 1152, 4, 1, 256, 6912, 512, 262144, 32768),
    "gemma-3-4b": _gemma3(34, 2560, 8, 4, 256, 10240, 1024, 262208, 131072),
    "gemma-3-12b": _gemma3(48, 3840, 16, 8, 256, 15360, 1024, 262208, 131072),
    "gemma-3-27b": _gemma3(62, 5376, 32, 16, 128, 21504, 1024, 262208, 131072),
}
"""By the name under which `argosy plan` takes them."""

NOTES = {
    name: "GPT-3 has locally banded attention in every other layer; the width of the bands was not published, so all "
    "layers are planned as dense"
    for name in SHAPES
    if name.startswith("gpt3-")
}
"""What a shape leaves out."""
