"""Sampling in Triton: the thresholds and distribution of the host's sampler, by other noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models.ops.kernels import NUM_SAMPLING_FIELDS
from models.ops.triton_sampling import floors, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _quiet_infinities() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of them."""
    with np.errstate(all="ignore"):
        yield


def parameters(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> np.ndarray:
    fields = np.zeros((NUM_SAMPLING_FIELDS, count), np.int32)
    states = np.random.default_rng(seed).integers(0, 1 << 64, count, np.uint64)
    fields[:2] = states.view(np.int32).reshape(count, 2).T
    fields[2] = np.float32(1 / temperature if temperature else 0).view(np.int32)
    fields[3] = top_k
    fields[4] = np.float32(top_p).view(np.int32)
    fields[5] = np.float32(temperature * math.log(min_p) if min_p else -np.inf).view(np.int32)
    return fields


def tokens(logits: torch.Tensor, fields: np.ndarray, known: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether they are garbage)."""
    count = len(logits)
    latest = torch.full((count + 3,), -7, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(count, dtype=torch.int32, device=DEVICE).flip(0)
    rows = torch.from_numpy(fields).to(DEVICE)
    out = sample(logits.to(DEVICE).contiguous(), rows, known or logits.shape[1], slots, latest).cpu().numpy()
    assert (latest.cpu().numpy()[:count][::-1] == out[:, 0]).all() and (latest[count:] == -7).all()
    return out[:, 0], out[:, 1].astype(bool)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(("size", "known"), [(17, 17), (5000, 4990), (9000, 4096), (12289, 12289)])
def test_greedy_rows_take_the_first_of_the_largest(size: int, known: int) -> None:
    logits = randn(5, size).round()
    logits[:, known:] = 99.0
    ids, is_garbage = tokens(logits, parameters(5, temperature=0.0), known)
    assert (ids == logits[:, :known].numpy().argmax(1)).all() and not is_garbage.any()


def test_garbage_is_told_and_stays_in_its_row() -> None:
    logits = randn(6, 5000)
    wanted = logits.numpy().argmax(1)
    logits[0, 4321], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 4998] = torch.nan  # of an id that does not exist
    for temperature in (0.0, 1.0):
        ids, is_garbage = tokens(logits, parameters(6, temperature), known=4990)
        assert is_garbage.tolist() == [True, True, True, False, False, False]
        assert ((ids >= 0) & (ids < 4990)).all()
        if not temperature:
            assert (ids[3:] == wanted[3:]).all()


def kept(row: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Which ids of a row of logits may be chosen, in double precision."""
    weights = np.exp((row.double().numpy() - row.max().item()) / temperature)
    keep = weights >= min_p
    if top_k:
        keep &= weights >= np.sort(weights)[-min(top_k, len(weights))]
    if top_p < 1.0:
        ordered = np.sort(weights * keep)[::-1]
        keep &= weights >= ordered[np.searchsorted(np.cumsum(ordered), top_p * ordered.sum())]
    return keep


@pytest.mark.parametrize(
    "truncation",
    [{"top_k": 7}, {"top_k": 9999}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.001}],
    ids=str,
)
def test_what_is_cut_off(truncation: dict[str, float]) -> None:
    logits, temperature = randn(3, 9000), 0.7
    logits[0] *= 0.1  # flat
    logits[1] = logits[1].round()  # ties
    rows = torch.from_numpy(parameters(3, temperature, **truncation)).to(DEVICE)  # type: ignore[arg-type]
    for row, floor in zip(logits, floors(logits.to(DEVICE), rows, 9000).tolist(), strict=True):
        wanted = row.numpy()[kept(row, temperature, **truncation)]  # type: ignore[arg-type]
        got = int((row >= floor).sum())
        assert abs(got - len(wanted)) <= 1e-3 * len(wanted) + 1, (got, len(wanted))


def test_the_distribution() -> None:
    """Chi-square against the exact probabilities."""
    count, temperature, row = 3000 if DEVICE.type == "cuda" else 300, 0.8, randn(60)
    ids, _ = tokens(row.expand(count, 60), parameters(count, temperature))
    expected = torch.softmax(row.double() / temperature, 0).numpy() * count
    seen = np.bincount(ids, minlength=60)
    is_large = expected >= 5
    chi = float(((seen - expected)[is_large] ** 2 / expected[is_large]).sum())
    degrees = int(is_large.sum())
    assert chi < degrees + 4 * math.sqrt(2 * degrees), (chi, degrees)
    assert abs(seen[~is_large].sum() - expected[~is_large].sum()) < 5 * math.sqrt(expected[~is_large].sum() + 1)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = randn(9, 5000)
    for truncation in ({}, {"top_k": 30, "top_p": 0.9, "min_p": 0.001}):
        fields = parameters(9, 1.3, **truncation)  # type: ignore[arg-type]
        together, _ = tokens(logits, fields)
        assert len(set(together.tolist())) > 3
        for row in (0, 8):
            alone, _ = tokens(logits[row : row + 1], np.ascontiguousarray(fields[:, row : row + 1]))
            assert alone[0] == together[row]


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy() -> None:
    logits = randn(2, 5000)
    for truncation in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        ids, _ = tokens(logits, parameters(2, 2.0, **truncation))  # type: ignore[arg-type]
        assert (ids == logits.numpy().argmax(1)).all(), truncation
