"""Values out of quantised blocks, against implementations that are not ours."""

from __future__ import annotations

import tracemalloc
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers.integrations.gguf import dequant

from models.store import StoreError
from models.store.gguf_file import FORMATS, GgufTensor
from models.store.gguf_tensors import Target, by_head, halves
from models.store.gguf_weights import bfloat16_entry, int4_entries, to_bfloat16


def blocks(format: str, shape: tuple[int, int], seed: int = 0) -> GgufTensor:
    """Random blocks whose scales are small fp16 numbers: every code and every packed scale occurs."""
    _, per_block, num_bytes = FORMATS[format]
    random = np.random.default_rng(seed)
    if per_block == 1:
        values = random.standard_normal(shape).astype(np.float32)
        data = gguf.quants.quantize(values, GGMLQuantizationType[format]).view(np.uint8).reshape(-1)
        return GgufTensor("t", shape, format, data)
    data = random.integers(0, 256, (shape[0], shape[1] // per_block, num_bytes), dtype=np.uint8)
    at = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(format, (0,))
    for place in at:
        scales = random.standard_normal(data.shape[:2]).astype(np.float16)
        data[:, :, place : place + 2] = scales[:, :, None].view(np.uint8)
    return GgufTensor("t", shape, format, data.reshape(-1))


def read(target: Target) -> np.ndarray[Any, Any]:
    """The whole bf16 tensor, widened to float32."""
    entry = bfloat16_entry(target)
    bits = np.concatenate([make().reshape(-1) for make in entry.pieces])
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)


def plain(tensor: GgufTensor, **changes: Any) -> Target:
    fields: dict[str, Any] = {"rows": slice(None), "is_linear": True, "shape": tensor.shape, **changes}
    return Target(name="t.weight", source=tensor, **fields)


def test_the_table_of_formats_is_ggmls() -> None:
    for name, (number, per_block, num_bytes) in FORMATS.items():
        kind = GGMLQuantizationType[name]
        assert (number, per_block, num_bytes) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_the_values_that_another_implementation_finds(format: str) -> None:
    tensor = blocks(format, (6, 512))
    flat = torch.from_numpy(np.array(tensor.data))
    match format:
        case "F32" | "F16" | "BF16":
            types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            wanted = flat.view(types[format]).float()
        case "Q5_0" | "Q5_1":  # which transformers does not read: ggml's own, checked by hand below
            wanted = torch.from_numpy(five_bits(tensor))
        case _:
            wanted = dequant.dequantize(flat, FORMATS[format][0])
    assert torch.allclose(torch.from_numpy(tensor.to_float32()).reshape(-1), wanted.reshape(-1), rtol=1e-6, atol=0)
    assert torch.equal(torch.from_numpy(read(plain(tensor))).reshape(-1), wanted.reshape(-1).bfloat16().float())


def five_bits(tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """Q5_0 and Q5_1 as ggml describes them: an fp16 scale (and minimum), 32 fifth bits, 16 bytes of two codes."""
    values = []
    for block in tensor.blocks(slice(None)).reshape(-1, FORMATS[tensor.format][2]):
        scale = float(block[:2].view(np.float16)[0])
        head = 2 if tensor.format == "Q5_0" else 4
        low = -16.0 * scale if tensor.format == "Q5_0" else float(block[2:4].view(np.float16)[0])
        fifth = int(block[head : head + 4].view("<u4")[0])
        codes = [*(block[head + 4 :] & 15), *(block[head + 4 :] >> 4)]
        values += [scale * (int(code) | (fifth >> place & 1) << 4) + low for place, code in enumerate(codes)]
    return np.array(values, np.float32)


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 9), halves(3, 4)])
def test_kept_codes_mean_the_values_that_ggml_means(format: str, rows: Any) -> None:
    tensor = blocks(format, (12, 96))
    height = len(np.arange(12)[rows])
    entries = int4_entries(plain(tensor, rows=rows, shape=(height, 96)))
    found = {entry.name: np.concatenate([make() for make in entry.pieces]) for entry in entries}
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == {
        "t.codes": ("U8", (height, 48)),
        "t.scales": ("F16", (height, 3)),
        **({"t.offsets": ("F16", (height, 3))} if format == "Q4_1" else {}),
    }
    values = np.empty((height, 96), np.float32)
    for row in range(height):
        for column in range(96):
            code = int(found["t.codes"][row, column // 2]) >> 4 * (column % 2) & 15
            scale = np.float32(found["t.scales"][row, column // 32])
            offset = found["t.offsets"][row, column // 32] if format == "Q4_1" else None
            values[row, column] = scale * (code - 8) if offset is None else scale * code + np.float32(offset)
    assert np.array_equal(values, tensor.to_float32()[rows])


def test_kept_codes_of_a_transposed_linear_stay_rows_of_outputs() -> None:
    tensor = blocks("Q4_1", (12, 96))
    entries = int4_entries(plain(tensor, shape=(96, 12), is_transposed=True))
    assert [entry.shape for entry in entries] == [(12, 48), (12, 3), (12, 3)]
    codes = np.concatenate([make() for make in entries[0].pieces])
    assert np.array_equal(codes, np.concatenate([make() for make in int4_entries(plain(tensor))[0].pieces]))


@pytest.mark.parametrize("bits", [0x7C00, 0x7E01, 0xFC00])
@pytest.mark.parametrize("place", [0, 2])
def test_scales_that_are_not_finite_are_refused(bits: int, place: int) -> None:
    tensor = blocks("Q4_1", (4, 64))
    tensor.data[20 * 5 + place : 20 * 5 + place + 2] = np.array([bits], np.uint16).view(np.uint8)
    with pytest.raises(StoreError, match=r"tensor 't': .* not finite"):
        for entry in int4_entries(plain(tensor)):
            for make in entry.pieces:
                make()
    with pytest.raises(StoreError, match=r"tensor 't': .* not finite"):
        read(plain(tensor))


def test_strips_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = blocks("Q8_0", (24, 64))
    whole = read(plain(tensor))
    turned = plain(tensor, shape=(64, 24), is_transposed=True)
    order = by_head(2, 4)
    monkeypatch.setattr("models.store.gguf_weights.STRIP_VALUES", 200)
    assert np.array_equal(read(plain(tensor)), whole)
    assert np.array_equal(read(turned), whole.T)
    assert np.array_equal(read(plain(tensor, rows=order)), whole[order])
    assert np.array_equal(read(plain(tensor, rows=slice(8, 16), shape=(8, 64))), whole[8:16])


def test_memory_stays_at_a_few_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.store.gguf_weights.STRIP_VALUES", 1 << 18)
    tensor = blocks("Q8_0", (2048, 4096))  # 32 MiB as float32
    entry = bfloat16_entry(plain(tensor))
    tracemalloc.start()
    try:
        for make in entry.pieces:
            make()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_rounding_to_bf16_is_torchs() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0, 0x80000000, 1, 0x007FFFFF], np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[np.abs(values) < 3.38e38]
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values), wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_bf16_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(StoreError, match="not finite"):
        to_bfloat16(np.array([1.0, value], np.float32))
