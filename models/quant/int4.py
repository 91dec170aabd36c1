"""4 bits per weight in groups of 32 inputs with an fp16 scale and, mostly, an offset: ggml's Q4_0 and Q4_1.

Stored codes are taken as they are; floating-point weights are rounded while they are loaded. Activations are quantised
to 8 bits per group of 32 inputs of a token, as llama.cpp does (its Q8_1). A head that is not stored as codes gets 8
bits: measured on SmolLM2-135M, whose file has 4-bit layers and an 8-bit head, 4 bits in the head alone raise the mean
loss by 0.058 ± 0.006, 8 bits by 0.001 ± 0.002.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from models.config import ModelError
from models.ops.codes import round_int4
from models.ops.kernels import GROUP_SIZE, Kernels
from models.quant.int8 import Int8
from models.quant.method import PackedWeight, WeightPart, claim_part, has_codes, read_part, stacked_shape
from models.quant.packer import Packer, pieces
from models.quant.unquantized import Unquantized
from models.weight_reader import WeightReader

Coded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and offsets of some rows, as `Kernels.pack_codes` takes them."""


class Int4:
    """Keeps codes in 4 bits. Weights whose inputs are not whole groups stay in floating point."""

    name = "int4"

    def __init__(self, kernels: Kernels, dtype: torch.dtype, packer: Packer) -> None:
        """dtype: of the weights that stay in floating point."""
        self._kernels = kernels
        self._dtype = dtype
        self._packer = packer
        self._plain = Unquantized(kernels, dtype, packer)
        self._int8 = Int8(kernels, dtype, packer)

    def load(self, reader: WeightReader, parts: Sequence[WeightPart]) -> PackedWeight:
        stored = [has_codes(reader, part) for part in parts]
        if parts[0].is_head and not any(stored):
            return self._int8.load(reader, parts)
        if not all(_is_whole(part.columns, part.shape[1]) for part in parts):
            if not any(stored):
                return self._plain.load(reader, parts)
            part = parts[stored.index(True)]
            columns = part.columns or range(part.shape[1])
            raise ModelError(
                f"{part.name} is stored in groups of {GROUP_SIZE} inputs, which inputs {columns.start} to "
                f"{columns.stop} of {part.shape[1]} would cut: choose another number of tensor-parallel ranks"
            )
        has_offsets = not all(stored) or any(reader.has(f"{part.name}.offsets") for part in parts)
        packed = self._kernels.empty_packed(*stacked_shape(parts), self._dtype, "int4", has_offsets)
        if not any(stored):
            self._packer.pack(reader, parts, packed)
            return PackedWeight(self._kernels, packed)
        for part in parts:  # also those of which this rank has nothing
            claim_part(reader, part)
        for rows in self._packer.strips(packed, packed.in_features):
            strip = _empty(len(rows), packed.in_features, has_offsets, packed.data.device)
            for part, into in pieces(parts, rows):
                self._read(reader, part, into, strip)
            if packed.data.device.type != "meta":
                self._packer.hand_over(functools.partial(self._kernels.pack_codes, packed, rows.start, *strip))
        return PackedWeight(self._kernels, packed)

    def _read(self, reader: WeightReader, part: WeightPart, into: range, strip: Coded) -> None:
        """Fill rows `into` of the strip with a part that is stored as codes or in floating point."""
        here = [whole[into.start : into.stop] for whole in strip if whole is not None]
        if not has_codes(reader, part):
            rows = torch.empty(part.part_shape, dtype=self._dtype, device=here[0].device)
            read_part(reader, part, rows)
            for whole, rounded in zip(here, round_int4(rows), strict=True):
                whole.copy_(rounded)
            return
        height, width = part.shape
        for name, whole, per in zip(("codes", "scales", "offsets"), here, (2, GROUP_SIZE, GROUP_SIZE), strict=False):
            if name == "offsets" and not reader.has(f"{part.name}.offsets"):
                whole.copy_(here[1]).mul_(-8)  # what symmetric codes say; a power of two, so exactly
                continue
            columns = None if part.columns is None else range(part.columns.start // per, part.columns.stop // per)
            reader.read_into(whole, f"{part.name}.{name}", (height, width // per), part.rows, columns)


def _is_whole(columns: range | None, width: int) -> bool:
    columns = range(width) if columns is None else columns
    return columns.start % GROUP_SIZE == 0 == columns.stop % GROUP_SIZE


def _empty(num_rows: int, width: int, has_offsets: bool, device: torch.device) -> Coded:
    empty = functools.partial(torch.empty, device=device)
    scales, offsets = (empty(num_rows, width // GROUP_SIZE, dtype=torch.float16) for _ in range(2))
    return empty(num_rows, width // 2, dtype=torch.uint8), scales, offsets if has_offsets else None
