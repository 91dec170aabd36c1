"""The values of a GGUF file's tensors as they are stored: rounded to bf16, or 4-bit codes as they are.

4-bit linears keep their codes (format "argosy-int4" in config.json's quantization_config). For the linear `name`
of out x in features there are, in groups of 32 inputs:
    name.codes    U8  [out, in / 2]: input 2j in the low four bits of byte j, 2j + 1 in the high ones
    name.scales   F16 [out, in / 32]
    name.offsets  F16 [out, in / 32], only of Q4_1
A value is code * scale + offset, or (code - 8) * scale where there are no offsets. The rows are [out] also where
Hugging Face's layout transposes the weight (GPT-2), for the groups run along the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from models.store.errors import StoreError
from models.store.gguf_file import FORMATS, Bytes, Float, GgufTensor, Rows
from models.store.gguf_tensors import Target
from models.store.safetensors_writer import Entry

STRIP_VALUES = 2 << 20
"""Values that a thread converts at once, so that memory does not grow with the size of a tensor."""

INT4_FORMATS = ("Q4_0", "Q4_1")
GROUP_SIZE = 32


def bfloat16_entry(target: Target) -> Entry:
    """The whole tensor, rounded to bf16."""
    pieces = [partial(_bfloat16_piece, target, values) for values in _value_pieces(target)]
    return Entry(target.name, "BF16", target.shape, pieces)


def int4_entries(target: Target) -> list[Entry]:
    """Codes, scales and, of Q4_1, offsets of a linear whose format is one of INT4_FORMATS."""
    tensor, stem = target.source, target.name.removesuffix(".weight")
    out_features, in_features = target.shape[::-1] if target.is_transposed else target.shape
    groups = (out_features, in_features // GROUP_SIZE)
    strips = list(_strips(tensor, target.rows))
    entries = [
        Entry(
            f"{stem}.codes", "U8", (out_features, in_features // 2), [partial(_codes, tensor, rows) for rows in strips]
        ),
        Entry(f"{stem}.scales", "F16", groups, [partial(_constants, tensor, rows, 0) for rows in strips]),
    ]
    if tensor.format == "Q4_1":
        entries.append(
            Entry(f"{stem}.offsets", "F16", groups, [partial(_constants, tensor, rows, 2) for rows in strips])
        )
    return entries


def to_bfloat16(values: Float) -> npt.NDArray[np.uint16]:
    """The bits of `values` rounded to bf16, to nearest and ties to even; same shape, C order.

    Raises StoreError when a value is not finite: rounding could turn a NaN into an infinity, and no model has any.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    if not np.isfinite(values).all() or ((rounded & 0x7FFF) == 0x7F80).any():
        raise StoreError("the weights hold values that are not finite: the file is damaged, fetch it again")
    return rounded.astype(np.uint16)


def unpack_codes(blocks: Bytes) -> Bytes:
    """Blocks of Q4_0 or Q4_1 [rows, groups, bytes] -> codes [rows, groups * 16], neighbours in one byte.

    ggml keeps inputs 0 to 15 of a group in the low halves of its last 16 bytes and 16 to 31 in the high ones.
    """
    packed = blocks[:, :, -16:]
    codes: Bytes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(blocks), -1)
    return codes[:, ::2] | np.left_shift(codes[:, 1::2], np.uint8(4))


def _bfloat16_piece(target: Target, values: Callable[[], Float]) -> npt.NDArray[np.uint16]:
    try:
        return to_bfloat16(values())
    except StoreError as error:
        raise StoreError(f"tensor {target.source.name!r}: {error}") from None


def _value_pieces(target: Target) -> Iterator[Callable[[], Float]]:
    """What makes the tensor's values, strip by strip."""
    tensor = target.source
    if len(tensor.shape) == 1:
        yield lambda: tensor.to_float32()[target.rows] + np.float32(target.shift)
    elif target.is_transposed:
        per_block = FORMATS[tensor.format][1]
        step = max(1, STRIP_VALUES // tensor.height // per_block) * per_block
        for first in range(0, tensor.width, step):
            yield partial(_turned, tensor, first, min(first + step, tensor.width))
    else:
        for rows in _strips(tensor, target.rows):
            yield partial(tensor.rows, rows)


def _turned(tensor: GgufTensor, first: int, last: int) -> Float:
    return tensor.columns(first, last).T


def _codes(tensor: GgufTensor, rows: Rows) -> Bytes:
    return unpack_codes(tensor.blocks(rows))


def _constants(tensor: GgufTensor, rows: Rows, offset: int) -> npt.NDArray[np.float16]:
    """One of the two fp16 numbers at the head of every block."""
    values = np.ascontiguousarray(tensor.blocks(rows)[:, :, offset : offset + 2]).view("<f2")[:, :, 0]
    if not np.isfinite(values).all():
        raise StoreError(
            f"tensor {tensor.name!r}: the scales hold values that are not finite: the file is damaged, fetch it again"
        )
    return values


def _strips(tensor: GgufTensor, rows: Rows) -> Iterator[Rows]:
    step = max(1, STRIP_VALUES // tensor.width)
    if isinstance(rows, slice):
        first, last, _ = rows.indices(tensor.height)
        for at in range(first, last, step):
            yield slice(at, min(at + step, last))
    else:
        for at in range(0, len(rows), step):
            yield rows[at : at + step]
