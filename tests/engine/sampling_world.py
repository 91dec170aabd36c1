"""The sampler's small world: a builder, and the slow float64 oracle of the distribution it draws from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from serving.engine.sampler import SampledTokens, Sampler
from serving.engine.sampling_rows import SamplingRows
from serving.types import SamplingParams

NO_IDS = np.zeros(0, np.int32)

Floats = npt.NDArray[np.float32]


def int32(*ids: int) -> npt.NDArray[np.int32]:
    return np.array(ids, np.int32)


def make_sampler(
    params: Sequence[SamplingParams],
    size: int,
    *,
    tokenizer_size: int | None = None,
    eos_ids: Sequence[int] = (0,),
    prompt_ids: npt.NDArray[np.int32] = NO_IDS,
    output_ids: npt.NDArray[np.int32] = NO_IDS,
) -> Sampler:
    """A sampler whose slot i holds params[i]."""
    rows = SamplingRows(max(len(params), 1), size, tokenizer_size or size, eos_ids)
    for slot, row in enumerate(params):
        rows.set_row(slot, row, prompt_ids, output_ids)
    return Sampler(rows)


def sample(sampler: Sampler, logits: Floats, slots: Sequence[int], positions: Sequence[int]) -> SampledTokens:
    """One step on a copy of `logits` [S, V]."""
    return sampler.sample(torch.tensor(logits), int32(*slots), int32(*positions))


def draws(params: SamplingParams, logits: Floats, count: int, **world: object) -> npt.NDArray[np.int32]:
    """The tokens of positions 0 … count - 1 for one row of logits [V]; the row must have no penalties."""
    sampler = make_sampler([params], logits.size, **world)  # type: ignore[arg-type]
    copies = torch.from_numpy(np.tile(logits, (count, 1)))
    return sampler.sample(copies, np.zeros(count, np.int32), np.arange(count, dtype=np.int32)).ids


def probabilities(
    logits: Floats,
    params: SamplingParams,
    *,
    tokenizer_size: int | None = None,
    eos_ids: Sequence[int] = (0,),
    prompt_ids: npt.NDArray[np.int32] = NO_IDS,
    output_ids: npt.NDArray[np.int32] = NO_IDS,
) -> npt.NDArray[np.float64]:
    """What `params` ask of a row of logits [V], by the book: loops, float64, full sorts. [V]."""
    x = [float(value) for value in logits]
    size = len(x)
    for i in range(tokenizer_size or size, size):
        x[i] = -np.inf
    if params.allowed_token_ids is not None:
        x = [value if i in params.allowed_token_ids else -np.inf for i, value in enumerate(x)]
    if output_ids.size < params.min_tokens:
        for i in (*eos_ids, *params.stop_token_ids):
            x[i] = -np.inf
    for i, bias in params.logit_bias:
        x[i] += bias
    outputs = output_ids.tolist()
    for i in {*outputs, *prompt_ids.tolist()}:
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
        x[i] -= params.frequency_penalty * outputs.count(i)
        x[i] -= params.presence_penalty * (i in outputs)
    values = np.array(x)
    if params.temperature == 0 or params.top_p == 0:
        greedy = np.zeros(size)
        greedy[int(values.argmax())] = 1
        return greedy
    weights = np.exp((values - values.max()) / params.temperature)
    weights[weights < params.min_p] = 0
    if 0 < params.top_k < size:
        weights[values < np.sort(values)[-params.top_k]] = 0
    weights /= weights.sum()
    if params.top_p < 1:
        descending = np.sort(weights)[::-1]
        last = int(np.searchsorted(np.cumsum(descending), params.top_p))
        weights[weights < descending[min(last, size - 1)]] = 0
    kept: npt.NDArray[np.float64] = weights / weights.sum()
    return kept
