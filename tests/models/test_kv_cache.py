"""Sizes and ownership of the KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.fields import Fields
from models.kv_cache import KVCache, bytes_per_block, bytes_per_token
from models.ops.reference import ReferenceKernels
from models.parallel import Stages
from models.registry import parse_config

CONFIG = parse_config(
    Fields(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "intermediate_size": 96,
            "vocab_size": 300,
        }
    )
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stages", [Stages(), Stages(0, 2), Stages(1, 2)])
def test_the_cache_occupies_what_was_announced(dtype: torch.dtype, stages: Stages) -> None:
    cache = KVCache(CONFIG, ReferenceKernels(), 7, 16, dtype, stages)
    assert cache.num_bytes == 7 * bytes_per_block(CONFIG, dtype, 16, stages)


def test_smollm2_costs_what_the_arithmetic_says() -> None:
    fields: dict[str, Any] = {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "num_layers": 30}
    config = ModelConfig(
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49152,
        norm_eps=1e-5,
        **fields,
    )
    assert bytes_per_token(config, torch.bfloat16) == 23_040


def test_layers_are_keyed_by_global_index() -> None:
    cache = KVCache(CONFIG, ReferenceKernels(), 2, 16, torch.float32, Stages(1, 2))
    assert [kv is not None for kv in cache.layers] == [False, False, True, True, True]


def test_the_padding_block_is_not_enough() -> None:
    with pytest.raises(ValueError, match=r"num_blocks must be at least 2 .*; got 1"):
        KVCache(CONFIG, ReferenceKernels(), 1, 16, torch.float32)
