"""Made-up weights are the same for every rank, and cost nothing where only shapes are wanted."""

from __future__ import annotations

import resource

import pytest
import torch

from models.config import ModelError
from models.fields import Fields
from models.parallel import Group, Stages
from models.random_weights import STD, RandomWeights
from models.registry import build_model, parse_config
from tests.models.test_loading import NoTransport

GPT3_SIZED_LLAMA = {
    "model_type": "llama",
    "hidden_size": 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "num_key_value_heads": 96,
    "intermediate_size": 32768,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
}


def values(name: str, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    RandomWeights(seed).read_into(out, name, shape)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_slices_of_the_whole(dtype: torch.dtype) -> None:
    whole = values("w", (300, 170), dtype=dtype)
    part = torch.empty(40, 31, dtype=dtype)
    RandomWeights().read_into(part, "w", (300, 170), range(250, 290), range(100, 131))
    assert torch.equal(part, whole[250:290, 100:131])
    vector = torch.empty(7, dtype=dtype)
    RandomWeights().read_into(vector, "norm.weight", (50,), range(20, 27))
    assert torch.equal(vector, values("norm.weight", (50,), dtype=dtype)[20:27])


def test_rows_wider_than_the_table() -> None:
    width = 5 << 19  # two and a half periods
    whole = values("w", (2, width))
    part = torch.empty(1, 1000)
    RandomWeights().read_into(part, "w", (2, width), range(1, 2), range(width - 1000, width))
    assert torch.equal(part, whole[1:, -1000:])


def test_tensors_rows_and_seeds_differ() -> None:
    whole = values("w", (300, 170))
    assert len({tuple(row) for row in whole.tolist()}) == 300
    assert not torch.equal(whole, values("v", (300, 170)))
    assert not torch.equal(whole, values("w", (300, 170), seed=1))


def test_values_are_normal_and_norms_are_near_one() -> None:
    whole = values("w", (500, 1000))
    assert whole.mean().item() == pytest.approx(0.0, abs=STD / 50)
    assert whole.std().item() == pytest.approx(STD, rel=0.02)
    assert (whole.abs() < STD).float().mean().item() == pytest.approx(0.6827, abs=0.01)
    assert values("norm.weight", (1000,)).mean().item() == pytest.approx(1.0, abs=0.01)
    assert values("q_proj.bias", (1000,)).mean().item() == pytest.approx(0.0, abs=0.01)


def test_one_name_has_one_shape() -> None:
    reader = RandomWeights()
    reader.claim("w", (2, 3))
    with pytest.raises(ModelError, match=r"w has shape \[2, 3\]; claimed again as \[3, 2\]"):
        reader.claim("w", (3, 2))


@pytest.mark.parametrize(("rank", "size", "stages"), [(0, 1, Stages()), (3, 8, Stages()), (15, 16, Stages(1, 2))])
def test_a_model_of_175_billion_parameters_has_shapes_without_memory(rank: int, size: int, stages: Stages) -> None:
    config = parse_config(Fields(GPT3_SIZED_LLAMA))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_model(
        config,
        RandomWeights(),
        device="meta",
        group=Group(rank, size, NoTransport() if size > 1 else None),
        stages=stages,
    )
    hidden, inner, vocab = 12288, 32768, 50257
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    layers = len(stages.layers(96)) * layer
    ends = (vocab * hidden if stages.is_first else 0) + (vocab * hidden + hidden if stages.is_last else 0)
    assert model.num_parameters == layers + ends
    assert model.weight_bytes == pytest.approx(2 * (layers + ends) / size, rel=0.01)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB: none of the weights
