"""The planner's account of weights equals what the layers allocate, byte by byte, on torch's meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from models.config import ModelConfig, ModelError
from models.fields import Fields
from models.footprint import Place, Precision, count_parameters, kv_bytes_per_token, share
from models.kv_cache import KVCache
from models.ops.kernels import PackedLinear
from models.ops.select import select_kernels
from models.parallel import Group, Stages
from models.random_weights import RandomWeights
from models.registry import ARCHITECTURES, build_model, parse_config
from serving.planning.shapes import SHAPES
from tests.models.paged import inference_on_one_thread

META = torch.device("meta")
BF16 = Precision(linear=2, table=2, vector=2)
MAX_MODEL_LEN = 512  # a short one: rotary tables are computed before they become meta


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with inference_on_one_thread():
        yield


class Elsewhere:
    """The other ranks, of whom loading hears nothing."""

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        raise AssertionError("loading moves nothing")

    def all_reduce(self, x: torch.Tensor) -> None:
        raise AssertionError("loading moves nothing")

    def close(self) -> None:
        """Nothing is open."""


def config_of(name: str, **overrides: Any) -> ModelConfig:
    return parse_config(Fields({**SHAPES[name], **overrides}))


def on_meta(config: ModelConfig, place: Place, reader: RandomWeights | None = None, quantization: str = "none") -> Any:
    group = Group(place.tensor_rank, place.tensor_size, Elsewhere() if place.tensor_size > 1 else None)
    stages = Stages(place.stage, place.pipeline_size)
    reader = reader or RandomWeights()
    return build_model(
        config,
        reader,
        device="meta",
        group=group,
        stages=stages,
        quantization=quantization,
        max_model_len=MAX_MODEL_LEN,
    )


def tensors_of(part: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that the model's parts hold, once."""
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from tensors_of(item, seen)
    elif type(part).__module__.startswith("models.") or isinstance(part, torch.Tensor):
        if id(part) in seen:
            return
        seen.add(id(part))  # the model keeps the part alive, so its id stays its own
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, PackedLinear):
            yield from tensors_of((part.data, part.scales, part.offsets), seen)
        else:
            yield from tensors_of(list(getattr(part, "__dict__", {}).values()), seen)


def allocated_bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(model, set()))


def ranks_of(tensor_size: int, pipeline_size: int) -> list[Place]:
    """The first and the last of each stage: all others are like one of them, or lie between."""
    ranks = sorted({0, tensor_size - 1})
    return [Place(tensor_size, pipeline_size, rank, stage) for stage in range(pipeline_size) for rank in ranks]


def assert_accounted(config: ModelConfig, place: Place, quantization: str = "none") -> None:
    model = on_meta(config, place, quantization=quantization)
    precision = dataclasses.replace(BF16, quantization=quantization)
    assert share(config, place, MAX_MODEL_LEN).num_bytes(precision) == allocated_bytes(model), place


def test_gpt3_has_its_parameters() -> None:
    config, reader = config_of("gpt3-175b"), RandomWeights()
    on_meta(config, Place(), reader)
    assert reader.num_parameters == 174_604_259_328
    assert count_parameters(config).total == 174_604_259_328


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["gpt3-175b", "llama-3.1-70b", "gemma-3-27b"])
def test_shards_of_dense_models(name: str, tensor_size: int) -> None:
    for place in ranks_of(tensor_size, 1):
        assert_accounted(config_of(name), place)


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8, 16])
def test_shards_of_experts(tensor_size: int) -> None:
    assert_accounted(config_of("qwen3-235b-a22b"), Place(tensor_size, 1, tensor_size - 1, 0))


@pytest.mark.parametrize("name", ["gpt3-175b", "llama-3.1-70b", "qwen3-235b-a22b", "gemma-3-27b"])
def test_shards_of_stages(name: str) -> None:
    for place in ranks_of(8, 2)[::2]:
        assert_accounted(config_of(name), place)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["gpt3-175b", "llama-3.1-70b", "qwen3-235b-a22b", "gemma-3-27b"])
def test_shards_of_quantised_models(name: str, quantization: str) -> None:
    for place in (Place(4, 1, 3, 0), Place(16, 2, 15, 1)):
        assert_accounted(config_of(name), place, quantization)


ODD: dict[str, dict[str, Any]] = {
    # Uneven inner sizes, vocabularies, layers and experts; a projection; no norm weights.
    "opt-350m": {"num_hidden_layers": 5, "vocab_size": 131, "ffn_dim": 301},
    "opt-125m": {"layer_norm_elementwise_affine": False, "enable_bias": False, "num_hidden_layers": 3},
    "gpt-neox-20b": {"num_hidden_layers": 3, "vocab_size": 131, "tie_word_embeddings": True},
    "gpt2": {"n_layer": 5, "n_inner": 97, "head_dim": 10},
    "llama-3.2-1b": {"num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True, "intermediate_size": 97},
    "mixtral-8x7b": {"num_hidden_layers": 3, "num_local_experts": 7, "vocab_size": 7},
    "qwen3-30b-a3b": {"num_hidden_layers": 5, "num_experts": 9, "mlp_only_layers": [0, 3], "intermediate_size": 97},
    "gemma-3-1b": {"num_hidden_layers": 5, "attention_bias": True},
    "qwen2.5-0.5b": {"num_hidden_layers": 3, "num_attention_heads": 8},
}


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize(("tensor_size", "pipeline_size"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str, tensor_size: int, pipeline_size: int, quantization: str) -> None:
    config = config_of(name, **ODD[name])
    for stage in range(pipeline_size):
        for rank in range(tensor_size):
            assert_accounted(config, Place(tensor_size, pipeline_size, rank, stage), quantization)


@pytest.mark.parametrize("name", ODD)
def test_parameters_of_odd_shapes(name: str) -> None:
    config, reader = config_of(name, **ODD[name]), RandomWeights()
    on_meta(config, Place(), reader)
    assert count_parameters(config).total == reader.num_parameters


def test_every_architecture_has_an_account() -> None:
    assert set(ARCHITECTURES) == {config["model_type"] for config in SHAPES.values()}


PUBLISHED = {
    "gpt2": 124_439_808,
    "opt-350m": 331_196_416,
    "gpt-neox-20b": 20_554_567_680,
    "smollm2-135m": 134_515_008,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_shapes_have_as_many_parameters_as_the_checkpoints(name: str) -> None:
    assert count_parameters(config_of(name)).total == PUBLISHED[name]


def test_what_a_token_does_not_choose_is_not_active() -> None:
    """As the names say: 22 of 235 billion, 3 of 30."""
    assert round(count_parameters(config_of("qwen3-235b-a22b")).active / 1e9, 1) == 22.2
    assert round(count_parameters(config_of("qwen3-30b-a3b")).active / 1e9, 1) == 3.4
    dense = count_parameters(config_of("llama-3.1-8b"))
    assert (dense.active, dense.expert) == (dense.total, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "gemma-3-1b", "qwen3-30b-a3b"])
def test_cache(name: str, dtype: torch.dtype) -> None:
    config, kernels = config_of(name), select_kernels(META, dtype)
    for tensor_size, pipeline_size in ((1, 1), (4, 1), (2, 2)):
        if config.num_heads % tensor_size or (config.num_kv_heads % tensor_size and tensor_size % config.num_kv_heads):
            continue
        place = Place(tensor_size, pipeline_size, tensor_size - 1, pipeline_size - 1)
        group = Group(place.tensor_rank, tensor_size, Elsewhere() if tensor_size > 1 else None)
        stages = Stages(place.stage, pipeline_size)
        cache = KVCache(config, kernels, 5, 16, dtype, stages, group)
        assert cache.num_bytes == 5 * 16 * kv_bytes_per_token(config, place, dtype.itemsize)


def test_what_cannot_be_divided_is_refused_as_by_the_layers() -> None:
    for name, place, words in [
        ("smollm2-135m", Place(2, 1), "9 query heads cannot be divided among 2 ranks"),
        ("gpt2", Place(1, 13), "12 layers cannot be divided among 13 stages"),
        ("llama-3.2-3b", Place(12, 1), "8 KV heads cannot be divided among 12 ranks"),
    ]:
        config = config_of(name)
        with pytest.raises(ModelError, match=words):
            share(config, place, MAX_MODEL_LEN)
        with pytest.raises(ModelError, match="cannot be divided"):
            on_meta(config, place)
