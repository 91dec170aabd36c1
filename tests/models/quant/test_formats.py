"""What the methods of the weight formats load: parts, stacks and slices of stored and of floating-point weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import Checkpoint
from models.config import ModelError
from models.decoder import Decoder
from models.ops.codes import join_codes, round_int4, round_int8, split_codes
from models.ops.kernels import GROUP_SIZE, Kernels
from models.ops.reference import ReferenceKernels
from models.ops.select import select_kernels
from models.quant.method import PackedWeight, WeightPart
from models.quant.packer import Packer
from models.registry import LINEAR_METHODS, load_model
from tests.tiny import tiny_llama

Tensors = dict[str, torch.Tensor]
SHAPE = (72, 96)  # rows that end within a panel


@pytest.fixture(params=["auto", "tiled", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return select_kernels(torch.device("cpu"), torch.bfloat16, request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stored(name: str, seed: int, is_symmetric: bool = False) -> tuple[Tensors, torch.Tensor]:
    """A weight of SHAPE as `argosy pull` keeps it, and its values."""
    codes = torch.randint(0, 16, SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    scales, offsets = (normal(SHAPE[0], 3, seed=seed + i).half() for i in (1, 2))
    per_input = [part.float().repeat_interleave(GROUP_SIZE, dim=1) for part in (scales, offsets)]
    tensors = {f"{name}.codes": join_codes(codes), f"{name}.scales": scales}
    if is_symmetric:
        return tensors, (codes.float() - 8) * per_input[0]
    return tensors | {f"{name}.offsets": offsets}, codes * per_input[0] + per_input[1]


def rounded(weight: torch.Tensor, format: str) -> torch.Tensor:
    """The values that remain."""
    if format == "int8":
        codes, scales = round_int8(weight)
        return codes * scales.unsqueeze(1)
    codes, scales, offsets = round_int4(weight)
    per_input = [part.float().repeat_interleave(GROUP_SIZE, dim=1) for part in (scales, offsets)]
    return split_codes(codes) * per_input[0] + per_input[1]


def load(
    folder: Path, tensors: Tensors, kernels: Kernels, format: str, parts: Sequence[WeightPart]
) -> tuple[PackedWeight, Checkpoint]:
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint, Packer(kernels, torch.bfloat16) as packer:
        weight = LINEAR_METHODS[format](kernels, torch.bfloat16, packer).load(checkpoint, parts)
        checkpoint.finish()
    return weight, checkpoint


def values(weight: PackedWeight) -> torch.Tensor:
    """[out, in]: what each input alone makes of the outputs."""
    return weight.apply(torch.eye(weight.packed.in_features) * 127).T / 127


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_floating_point_weights_are_rounded(tmp_path: Path, kernels: Kernels, format: str, is_transposed: bool) -> None:
    weight = normal(*SHAPE)
    tensors = {"a.weight": weight.T.contiguous() if is_transposed else weight}
    loaded, checkpoint = load(tmp_path, tensors, kernels, format, [WeightPart("a", SHAPE, is_transposed=is_transposed)])
    assert_near(values(loaded), rounded(weight, format))
    assert checkpoint.num_parameters == weight.numel()
    bits = {"int8": 8 * weight.numel() + 32 * SHAPE[0], "int4": 5 * weight.numel()}[format]
    assert loaded.num_bytes == bits // 8


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_stored_codes_are_kept(tmp_path: Path, kernels: Kernels, is_symmetric: bool) -> None:
    tensors, wanted = stored("a", 1, is_symmetric)
    loaded, checkpoint = load(tmp_path, tensors, kernels, "int4", [WeightPart("a", SHAPE)])
    assert_near(values(loaded), wanted)
    assert checkpoint.num_parameters == SHAPE[0] * SHAPE[1]
    assert loaded.num_bytes * 8 / (SHAPE[0] * SHAPE[1]) == (4.5 if is_symmetric else 5)


def test_a_stack_of_everything(tmp_path: Path, kernels: Kernels) -> None:
    """Codes with offsets, codes without, and a weight in floating point; rows of each."""
    first, first_values = stored("a", 1)
    second, second_values = stored("b", 2, is_symmetric=True)
    third = normal(*SHAPE, seed=3)
    ranges = [range(5, 72), range(0, 40), range(31, 64)]
    parts = [WeightPart(name, SHAPE, rows) for name, rows in zip("abc", ranges, strict=True)]
    loaded, checkpoint = load(tmp_path, first | second | {"c.weight": third}, kernels, "int4", parts)
    wanted = [first_values, second_values, rounded(third, "int4")]
    assert_near(values(loaded), torch.cat([whole[r.start : r.stop] for whole, r in zip(wanted, ranges, strict=True)]))
    assert checkpoint.num_parameters == 3 * third.numel()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rows_of_a_rank_have_the_bits_of_the_whole(tmp_path: Path, format: str) -> None:
    kernels = select_kernels(torch.device("cpu"), torch.bfloat16)
    x = normal(7, SHAPE[1], seed=5).float()
    tensors = {"a.weight": normal(*SHAPE)}
    whole, _ = load(tmp_path, tensors, kernels, format, [WeightPart("a", SHAPE)])
    ranks = [load(tmp_path, tensors, kernels, format, [WeightPart("a", SHAPE, r)])[0] for r in _halves(SHAPE[0])]
    assert torch.equal(torch.cat([rank.apply(x) for rank in ranks], dim=1), whole.apply(x))


def test_columns_of_a_rank(tmp_path: Path, kernels: Kernels) -> None:
    """Groups of 32 inputs are whole on every rank, so int4 has the values of the whole; int8 has scales of its own."""
    tensors, wanted = stored("a", 1)
    plain = {"a.weight": normal(*SHAPE)}
    for columns in (range(0, 64), range(64, 96)):
        part, here = [WeightPart("a", SHAPE, columns=columns)], slice(columns.start, columns.stop)
        assert_near(values(load(tmp_path, tensors, kernels, "int4", part)[0]), wanted[:, here])
        for format in ("int8", "int4"):
            loaded, _ = load(tmp_path, plain, kernels, format, part)
            assert_near(values(loaded), rounded(plain["a.weight"][:, here], format))


def test_columns_that_cut_a_group(tmp_path: Path, kernels: Kernels) -> None:
    part = [WeightPart("a", SHAPE, columns=range(48, 96))]
    message = "a is stored in groups of 32 inputs, which inputs 48 to 96 of 96 would cut: choose another number"
    with pytest.raises(ModelError, match=message):
        load(tmp_path, stored("a", 1)[0], kernels, "int4", part)
    weight = normal(*SHAPE)
    loaded, _ = load(tmp_path, {"a.weight": weight}, kernels, "int4", part)
    assert loaded.packed.format == "plain"
    torch.testing.assert_close(values(loaded), weight[:, 48:].float(), atol=0, rtol=1e-2)


def test_a_head_in_8_bits(tmp_path: Path, kernels: Kernels) -> None:
    """Unless it is stored in 4."""
    weight, (tensors, wanted) = normal(*SHAPE), stored("a", 1)
    loaded, _ = load(tmp_path, {"a.weight": weight}, kernels, "int4", [WeightPart("a", SHAPE, is_head=True)])
    assert_near(values(loaded), rounded(weight, "int8"))
    loaded, _ = load(tmp_path, tensors, kernels, "int4", [WeightPart("a", SHAPE, is_head=True)])
    assert_near(values(loaded), wanted)


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path, kernels: Kernels) -> None:
    tensors, _ = stored("a", 1)
    without = {name: tensor for name, tensor in tensors.items() if name != "a.scales"}
    with pytest.raises(ModelError, match=r"the tensor a.scales is missing"):
        load(tmp_path, without, kernels, "int4", [WeightPart("a", SHAPE)])
    short = tensors | {"a.codes": tensors["a.codes"][:, 1:].contiguous()}
    with pytest.raises(ModelError, match=r"the tensor a.codes must have shape \[72, 48\]; got \[72, 47\]"):
        load(tmp_path, short, kernels, "int4", [WeightPart("a", SHAPE)])
    with pytest.raises(ModelError, match=r"the tensor b.weight is missing"):
        load(tmp_path, tensors, kernels, "int4", [WeightPart("b", SHAPE)])


def four_bit_folder(folder: Path) -> Path:
    """A tiny Llama whose layers are stored as codes; embedding and head are not."""
    tiny_llama(folder, hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96, dtype=torch.bfloat16)
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        stem = name.removesuffix(".weight")
        kept = zip(("codes", "scales", "offsets"), round_int4(weight), strict=True)
        tensors |= {f"{stem}.{part}": tensor for part, tensor in kept}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "argosy-int4", "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_which_format_a_folder_gets(tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "plain", hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96)
    four_bit = four_bit_folder(tmp_path / "four-bit")
    for folder, asked, got in (
        (plain, "auto", "float32"),
        (plain, "none", "float32"),
        (plain, "int8", "int8"),
        (plain, "int4", "int4"),
        (four_bit, "auto", "int4"),
        (four_bit, "int4", "int4"),
    ):
        model = load_model(folder, dtype="float32", quantization=asked)
        assert model.weight_format == got
        assert model.num_parameters == load_model(folder).num_parameters
    for asked in ("int8", "none"):
        with pytest.raises(ModelError, match=f"quantization '{asked}' is not possible: .* stored as argosy-int4"):
            load_model(four_bit, quantization=asked)
    with pytest.raises(ModelError, match="quantization must be one of auto, none, int8, int4; got 'int3'"):
        load_model(plain, quantization="int3")


def test_widths_that_are_no_whole_groups_stay_in_floating_point(tmp_path: Path) -> None:
    """hidden 80 and intermediate 97 are none; 5 heads of 24 are not either. The head has 8 bits."""
    folder = tiny_llama(tmp_path)
    reference = ReferenceKernels(torch.float32)
    plain = load_model(folder, dtype="float32", kernels=reference)
    assert isinstance(plain, Decoder) and plain.head is not None
    model = load_model(folder, dtype="float32", quantization="int4", kernels=reference)
    head_bytes = 131 * 80 + 131 * 4
    assert model.weight_bytes == plain.weight_bytes - plain.head.num_bytes + head_bytes


def _halves(size: int) -> list[range]:
    return [range(size // 2), range(size // 2, size)]
