"""config.json of models that people have, as they lie on the hub: what we understand of them."""

from __future__ import annotations

from typing import Any

import pytest

from models.config import Experts, Llama3Scaling, Rotary
from models.random_weights import RandomWeights
from models.registry import build_model
from tests.models.architectures.parsing import parsed

QWEN2 = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
MISTRAL = {
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {**MISTRAL, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
    "Mistral-7B-v0.3": {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "Mixtral-8x7B-v0.1": {
        **MISTRAL,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "Qwen2.5-0.5B": {
        **QWEN2,
        "eos_token_id": 151643,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "num_hidden_layers": 24,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
    },
    "Qwen2.5-7B": {
        **QWEN2,
        "eos_token_id": 151643,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        **QWEN3,
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        **QWEN3,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
    },
    "Qwen3-30B-A3B": {
        **QWEN3_MOE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "Qwen3-235B-A22B": {
        **QWEN3_MOE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 94,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
    "gemma-3-1b-it": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}

SHAPES = {
    "Llama-3.1-8B": (4096, 32, 32, 8, 128, 14336, 128256, 131072, False),
    "Mistral-7B-v0.1": (4096, 32, 32, 8, 128, 14336, 32000, 32768, False),
    "Mistral-7B-v0.3": (4096, 32, 32, 8, 128, 14336, 32768, 32768, False),
    "Mixtral-8x7B-v0.1": (4096, 32, 32, 8, 128, 14336, 32000, 32768, False),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 64, 4864, 151936, 32768, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 128, 18944, 152064, 131072, False),
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151936, 40960, True),
    "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, 40960, False),
    "Qwen3-30B-A3B": (2048, 48, 32, 4, 128, 6144, 151936, 40960, False),
    "Qwen3-235B-A22B": (4096, 94, 64, 4, 128, 12288, 151936, 40960, False),
    "gemma-3-1b-it": (1152, 26, 4, 1, 256, 6912, 262144, 32768, True),
}
"""Width, layers, heads, KV heads, head size, inner width, vocabulary, positions, whether the head is tied."""


NUM_PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gemma-3-1b-it": 999_885_952,
}
"""As published."""


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_of_parameters(name: str) -> None:
    """On the meta device, where a model has shapes and no values."""
    model = build_model(parsed(CONFIGS[name]), RandomWeights(), device="meta", max_model_len=1)
    assert model.num_parameters == NUM_PARAMETERS[name]


def test_a_token_of_a_mixture_reads_few_of_its_parameters() -> None:
    """Qwen calls it A3B: three billion of thirty, of which the embedding table is looked up and not read."""
    config = parsed(CONFIGS["Qwen3-30B-A3B"])
    model = build_model(config, RandomWeights(), device="meta", max_model_len=1)
    assert round((model.weight_bytes / 2 + config.vocab_size * config.hidden_size) / 1e9, 2) == 3.35


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name: str) -> None:
    config = parsed(CONFIGS[name])
    assert SHAPES[name] == (
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
        config.tie_word_embeddings,
    )


def test_llama() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert parsed(CONFIGS["Llama-3.1-8B"]).rotary == Rotary(theta=500000.0, size=128, scaling=scaling)


def test_mistral() -> None:
    """The window went with v0.2."""
    old, new = parsed(CONFIGS["Mistral-7B-v0.1"]), parsed(CONFIGS["Mistral-7B-v0.3"])
    assert (old.windows, new.windows) == ((4096,) * 32, ())
    assert (old.rotary, new.rotary) == (Rotary(theta=10000.0, size=128), Rotary(theta=1000000.0, size=128))


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B"])
def test_qwen2(name: str) -> None:
    """They all state a window that none of them uses."""
    config = parsed(CONFIGS[name])
    assert (config.windows, config.has_head_norm) == ((), False)
    assert (config.has_qkv_bias, config.has_output_bias, config.has_mlp_bias) == (True, False, False)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_qwen3(name: str) -> None:
    config = parsed(CONFIGS[name])
    assert (config.windows, config.has_head_norm, config.has_qkv_bias) == ((), True, False)
    assert (config.eos_token_ids, config.bos_token_id) == ((151645,), 151643)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("Mixtral-8x7B-v0.1", (8, 2, 14336)),
        ("Qwen3-30B-A3B", (128, 8, 768)),
        ("Qwen3-235B-A22B", (128, 8, 1536)),
    ],
)
def test_experts(name: str, experts: tuple[int, int, int]) -> None:
    num_experts, chosen, inner = experts
    assert parsed(CONFIGS[name]).experts == Experts(
        num_experts=num_experts, num_experts_per_token=chosen, intermediate_size=inner, is_normalised=True
    )


def test_gemma() -> None:
    config = parsed(CONFIGS["gemma-3-1b-it"])
    assert config.windows == tuple(0 if layer % 6 == 5 else 512 for layer in range(26))
    assert (config.rotary, config.local_rotary) == (Rotary(theta=1e6, size=256), Rotary(theta=1e4, size=256))
    assert (config.scale, config.eos_token_ids) == (1 / 16, (1, 106))
