"""Rounding to small integers: weights once, activations in the kernels that are written in torch.

`models/ops/cpu_codes.h` codes activations by the very same operations in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from models.ops.kernels import GROUP_SIZE, PackedLinear

ROUNDING_VERSION = 1  # raised when the same weights get other codes
_SMALLEST = 2.0**-100  # groups whose values are all smaller count as zero


def round_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [n, K] and scales float32 [n] with rows ≈ codes * scales.

    A scale is the row's greatest magnitude / 127; codes are rounded to nearest, ties to even. A row with a NaN or
    an infinity has the scale NaN and codes 0: whatever it computes shows that it is broken.
    """
    codes, scales, _ = code_activations(rows, rows.shape[1])
    return codes, scales.flatten()


def code_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] -> codes int8 [M, K], steps float32 [M, G] and sums of codes float32 [M, G], a step per `group` inputs.

    The last group may be short. Broken groups are treated as the rows of `round_int8`, and values below 2^-100 as zero.
    """
    rows, width = x.shape
    grouped = F.pad(x.float(), (0, -width % group)).view(rows, -1, group)
    peak = grouped.abs().amax(-1, keepdim=True)
    is_used = peak.isfinite() & (peak >= _SMALLEST)
    inverse = peak.new_tensor(127.0).div(peak.masked_fill(~is_used, 1.0))  # 127.0 / peak would multiply by 1 / peak
    codes = (grouped * inverse).round_().masked_fill_(~is_used, 0.0)
    steps = (peak / 127.0).masked_fill(peak < _SMALLEST, 0.0).masked_fill(~peak.isfinite(), torch.nan)
    return codes.to(torch.int8).flatten(1)[:, :width], steps.squeeze(-1), codes.sum(-1)


def round_int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and offsets of `rows` [n, K] as `Kernels.pack_codes` takes them, K a multiple of GROUP_SIZE.

    A group's offset is its smallest value and 15 scales above it lies its greatest, both rounded to fp16; then each
    value takes the nearest code. Groups with a NaN or an infinity get the offset NaN.
    """
    height, width = rows.shape
    grouped = rows.float().reshape(height, width // GROUP_SIZE, GROUP_SIZE)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    offsets = low.half()
    scales = ((high - offsets.float()) / 15.0).half()
    is_sound = scales.isfinite() & offsets.isfinite() & grouped.isfinite().all(-1, keepdim=True)
    offsets = offsets.masked_fill(~is_sound, torch.nan)
    scales = scales.masked_fill(~is_sound, 0.0)
    divisor = scales.float().masked_fill(scales == 0, 1.0)
    codes = ((grouped - offsets.float()) / divisor).round_().clamp_(0, 15).masked_fill_(scales == 0, 0.0)
    return join_codes(codes.flatten(1).to(torch.uint8)), scales.squeeze(-1), offsets.squeeze(-1)


def join_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 0..15 [n, K] -> [n, K / 2], the even input in the low four bits."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def split_codes(joined: torch.Tensor) -> torch.Tensor:
    """The inverse of `join_codes`."""
    return torch.stack((joined & 15, joined >> 4), dim=-1).flatten(1)


def check_size(in_features: int, format: str) -> None:
    """Raises ValueError for a width that `format` does not cover."""
    if format == "int4" and in_features % GROUP_SIZE:
        raise ValueError(f"int4 linears have a multiple of {GROUP_SIZE} inputs; got {in_features}")


def check_codes(packed: PackedLinear, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> None:
    """Raises ValueError unless these are rows of `packed`, in the types of `Kernels.pack_codes`."""
    if packed.format != "int4":
        raise ValueError(f"stored codes belong into an int4 weight; got {packed.format!r}")
    if packed.has_offsets != (offsets is not None):
        raise ValueError(f"offsets are {'missing' if offsets is None else 'given'}, but the weight was made otherwise")
    wanted = {"codes": (codes, torch.uint8, packed.in_features // 2)}
    for name, tensor in (("scales", scales), ("offsets", offsets)):
        if tensor is not None:
            wanted[name] = (tensor, torch.float16, packed.in_features // GROUP_SIZE)
    for name, (tensor, dtype, width) in wanted.items():
        if tensor.dtype is not dtype or tensor.shape != (len(codes), width):
            raise ValueError(f"{name} must be {dtype} [{len(codes)}, {width}]; got {tensor.dtype} {list(tensor.shape)}")
