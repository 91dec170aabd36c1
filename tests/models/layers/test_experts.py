"""Which experts a token gets, and in which order they are added: functions of the token alone (C4)."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.architectures.mixtral import MixtralForCausalLM
from models.config import ModelConfig
from models.fields import Fields
from models.layers.experts import ExpertNames, MixtureOfExperts
from models.layers.loader import Loader
from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from models.ops.select import select_kernels
from models.parallel import Group
from models.quant.packer import Packer
from models.quant.unquantized import Unquantized
from models.random_weights import RandomWeights
from models.weight_reader import WeightReader

NAMES = ExpertNames("mixture", gate="gate", up="up", down="down")
CPU = torch.device("cpu")


class Given:
    """A WeightReader of tensors that a test writes down."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.num_parameters = 0
        self._tensors = tensors

    def has(self, name: str) -> bool:
        return name in self._tensors

    def claim(self, name: str, shape: tuple[int, ...]) -> None:
        assert self._tensors[name].shape == shape

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        self.claim(name, shape)
        rows = rows or range(shape[0])
        out.copy_(self._tensors[name][rows.start : rows.stop])

    def skip(self, prefix: str) -> None:
        """Everything is there to be read."""


def config(width: int, inner: int, num_experts: int, num_chosen: int) -> ModelConfig:
    fields = {
        "model_type": "mixtral",
        "hidden_size": width,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": inner,
        "vocab_size": 8,
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_chosen,
        "head_dim": 2,
    }
    return MixtralForCausalLM.parse(Fields(fields))


def mixture(reader: WeightReader, config: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> MixtureOfExperts:
    with Packer(kernels, dtype) as packer:
        loader = Loader(reader, kernels, Unquantized(kernels, dtype, packer), Group(), dtype, CPU)
        return MixtureOfExperts(loader, config, NAMES)


def given(router: torch.Tensor, downs: list[float]) -> Given:
    """Experts of width 1 whose output is their entry of `downs` times the same number."""
    tensors = {"mixture.gate.weight": router}
    for i, down in enumerate(downs):
        for name, value in (("gate", 3.0), ("up", 1.0), ("down", down)):
            tensors[f"mixture.experts.{i}.{name}.weight"] = torch.tensor([[value]])
    return Given(tensors)


def test_equal_probabilities_choose_the_lower_experts() -> None:
    router = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0], [0.0]])
    layer = mixture(given(router, [1.0] * 6), config(1, 1, 6, 4), ReferenceKernels(), torch.float32)
    chosen, weights = layer.choose(torch.tensor([[5.0], [-5.0], [0.0]]))
    assert chosen.tolist() == [[1, 3, 4, 0], [0, 2, 5, 1], [0, 1, 2, 3]]
    assert torch.equal(weights[2], torch.full((4,), 0.25))


def test_contributions_are_added_in_the_order_of_the_experts() -> None:
    """The most probable is the last, and its contribution is the one that swallows the others."""
    router, downs, x = torch.tensor([[0.0], [0.1], [0.2]]), [1.0, 1.3e8, -1.2e8], torch.ones(1, 1)

    def result(downs: list[float]) -> torch.Tensor:
        return mixture(given(router, downs), config(1, 1, 3, 3), ReferenceKernels(), torch.float32)(x)

    alone = [result([down if i == which else 0.0 for i, down in enumerate(downs)]) for which in range(3)]
    in_order = (alone[0] + alone[1]) + alone[2]
    by_probability = (alone[2] + alone[1]) + alone[0]
    assert torch.equal(result(downs), in_order)
    assert not torch.equal(in_order, by_probability)


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", torch.bfloat16), ("cpu", torch.float32), ("tiled", torch.float32)])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(3, 2), (33, 8), (128, 8)])
def test_a_token_does_not_depend_on_its_batch(kind: str, dtype: torch.dtype, num_experts: int, num_chosen: int) -> None:
    """Choice, weights and result, bitwise, for tokens in batches of all kinds of sizes."""
    try:
        kernels = select_kernels(CPU, dtype, kind)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"{kind} kernels are not available: {error}")
    layer = mixture(RandomWeights(seed=1), config(40, 24, num_experts, num_chosen), kernels, dtype)
    if not kernels.is_exact:
        pytest.skip(f"{kind} kernels are not exact on this machine")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(41, 40, generator=generator) * 20
    chosen, weights = layer.choose(x)
    assert len(chosen.unique()) > num_chosen  # the tokens do not all agree
    out = layer(x)
    order = torch.randperm(len(x), generator=generator)
    for start, stop in itertools.pairwise((0, 1, 2, 4, 7, 16, 41)):
        rows = order[start:stop]
        some_chosen, some_weights = layer.choose(x[rows])
        assert torch.equal(some_chosen, chosen[rows])
        assert torch.equal(some_weights.view(torch.int32), weights[rows].view(torch.int32))
        assert torch.equal(layer(x[rows]).view(torch.int32), out[rows].view(torch.int32))
