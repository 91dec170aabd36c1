"""From logits to tokens: a pure function of (logits row, parameters, seed, choice, position) (C3).

The only thing that a call changes is the token counts of rows with penalties.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from serving.engine.categorical import Categorical, FloatRow
from serving.engine.noise import uniforms
from serving.engine.sampling_rows import EDITED, RANDOM, SCORED, SamplingRows

_ALTERNATIVE = np.dtype([("id", "<u4"), ("logprob", "<f4")])


class NonFiniteLogits(Exception):
    """The model computed NaN, +inf, or nothing but -inf for some rows: garbage that must not be emitted (F8).

    slots: int32, of those rows. Nothing has been sampled, counted or edited: the caller may drop these rows
    and call again with the others.
    """

    def __init__(self, slots: npt.NDArray[np.int32]) -> None:
        super().__init__(f"non-finite logits in {slots.size} rows, slots {slots.tolist()}")
        self.slots = slots


@dataclasses.dataclass(slots=True)
class SampledTokens:
    """What one step sampled, in the order of the logits rows."""

    ids: npt.NDArray[np.int32]  # [S]
    logprobs: dict[int, bytes] | None = None
    """Row index -> packed as in wire.Step: f32 logprob of the sampled token, then (u32 id, f32 logprob) of the
    alternatives, best first. None when no row of the step wants any."""


def argmax_rows(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Index of each row's maximum: the lowest among equals, a NaN's where there is one. [S, V] -> [S].

    numpy documents both, so one pass finds the greedy tokens and every row of garbage.
    """
    ids: npt.NDArray[np.intp] = logits.argmax(axis=-1)
    return ids


class Sampler:
    """Samples the rows of a step on the CPU. One per engine: it owns scratch memory and is not thread-safe."""

    def __init__(self, rows: SamplingRows) -> None:
        self._rows = rows
        self._categorical = Categorical(rows.logits_size)

    def sample(
        self, logits: torch.Tensor, slots: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> SampledTokens:
        """One token per row.

        logits: float32 [S, logits_size] on the CPU; overwritten. slots: int32 [S]. positions: int32 [S], the
        number of output tokens before the one being sampled. The sampled ids are appended to the token counts
        of their slots, in the order of the rows; a slot without penalties may occur at several positions.

        Raises NonFiniteLogits, before anything has changed but logits of ids >= tokenizer_size, and ValueError
        for logits of another shape or type.
        """
        rows = self._rows
        if logits.shape != (slots.size, rows.logits_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, not float32 {[slots.size, rows.logits_size]}"
            )
        values: npt.NDArray[np.float32] = logits.numpy()
        if rows.tokenizer_size < rows.logits_size:
            values[:, rows.tokenizer_size :] = -np.inf
        best = argmax_rows(values)
        peaks = np.take_along_axis(values, best[:, None], 1)[:, 0]
        is_finite = np.isfinite(peaks)
        if not is_finite.all():
            raise NonFiniteLogits(slots[~is_finite])
        ids = best.astype(np.int32)
        kinds = rows.kind[slots]
        if not kinds.any():
            return SampledTokens(ids)
        # Differences of huge logits and products with a huge inverse temperature may overflow to -inf, rightly.
        with np.errstate(over="ignore"):
            logprobs = self._sample_special(values, slots, positions, kinds, peaks, ids)
        return SampledTokens(ids, logprobs)

    def _sample_special(
        self,
        values: npt.NDArray[np.float32],
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        kinds: npt.NDArray[np.uint8],
        peaks: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32],
    ) -> dict[int, bytes] | None:
        """Sample the rows whose kind is not plain greedy into `ids`. Returns packed log-probabilities."""
        rows = self._rows
        at = np.flatnonzero(kinds)
        used = slots[at]
        noise = uniforms(rows.noise_key[used], positions[at])
        logprobs: dict[int, bytes] = {}
        for i, slot, kind, uniform, temperature, inverse_temperature, top_k, top_p, min_p in zip(
            at.tolist(),
            used.tolist(),
            kinds[at].tolist(),
            noise.tolist(),
            rows.temperature[used].tolist(),
            rows.inverse_temperature[used],
            rows.top_k[used].tolist(),
            rows.top_p[used].tolist(),
            rows.min_p[used].tolist(),
            strict=True,
        ):
            row = values[i]
            peak = raw_peak = peaks[i]
            token = int(ids[i])
            is_drawn = bool(kind & RANDOM)
            edits = rows.edits[slot] if kind & EDITED else None
            raw = row.copy() if edits is not None and kind & SCORED else row
            if edits is not None and edits.apply(row, int(positions[i])):
                token = int(row.argmax())
                peak = row[token]
                if peak == -np.inf:
                    token, is_drawn = edits.fallback_id, False
            if is_drawn:
                token = self._categorical.draw(
                    row, peak, temperature, inverse_temperature, top_k, top_p, min_p, uniform
                )
            if kind & SCORED:
                logprobs[i] = self._score(raw, raw_peak, token, int(rows.num_logprobs[slot]))
            if edits is not None:
                edits.append(token)
            ids[i] = token
        return logprobs or None

    def _score(self, raw: FloatRow, peak: np.float32, token: int, count: int) -> bytes:
        """Packed log-probabilities of the model's own distribution: no temperature, penalty or mask."""
        normaliser = self._categorical.log_normaliser(raw, peak)
        packed = np.array(float(raw[token]) - float(peak) - normaliser).astype("<f4").tobytes()
        if count == 0:
            return packed
        best = self._categorical.best_ids(raw, count)
        alternatives = np.empty(best.size, _ALTERNATIVE)
        alternatives["id"] = best
        alternatives["logprob"] = raw[best].astype(np.float64) - float(peak) - normaliser
        return packed + alternatives.tobytes()
