"""What a row's parameters change in its logits before sampling: masks, bias and penalties.

Rare, so one object per slot that asks for it; plain rows have none. The order is vLLM's:
allowed_token_ids, min_tokens, logit_bias, then the penalties (repetition, frequency, presence).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from serving.types import SamplingParams

FloatRow = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_LARGEST = np.finfo(np.float32).max
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a repetition penalty that float32 would flush to 0 makes NaN


def needs_edits(params: SamplingParams) -> bool:
    """Whether any step of a row with these parameters changes its logits."""
    return (
        bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or params.min_tokens > 0
        or has_penalties(params)
    )


def has_penalties(params: SamplingParams) -> bool:
    """Whether the row needs its prompt and output tokens counted."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _checked_ids(param: str, ids: Iterable[int] | npt.NDArray[np.int32], limit: int) -> Ids:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    if array.size and (array.min() < 0 or array.max() >= limit):
        bad = int(array[(array < 0) | (array >= limit)][0])
        raise ValueError(f"{param}: token id {bad} is not below the logits size of {limit}")
    return array


class _Penalties:
    """Token counts of one slot and the penalties that they cause.

    Only ids that occurred can change, so the cost of a step follows the row's length, not the vocabulary.
    """

    def __init__(self, params: SamplingParams, logits_size: int, prompt_ids: Ids, output_ids: Ids) -> None:
        self._repetition = np.float32(max(params.repetition_penalty, _SMALLEST_SCALE))
        self._frequency = np.float32(params.frequency_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._output_counts = np.bincount(output_ids, minlength=logits_size).astype(np.float32)
        self._has_occurred = np.zeros(logits_size, np.bool_)
        # Frequency and presence look at the output alone.
        if self._repetition != 1.0:
            self._has_occurred[prompt_ids] = True
        self._has_occurred[output_ids] = True
        occurred = np.flatnonzero(self._has_occurred)
        self._num_occurred = occurred.size
        self._occurred = np.zeros(occurred.size + 64, np.int64)
        self._occurred[: occurred.size] = occurred

    def append(self, token_id: int) -> None:
        self._output_counts[token_id] += 1.0
        if self._has_occurred[token_id]:
            return
        self._has_occurred[token_id] = True
        if self._num_occurred == self._occurred.size:
            self._occurred = np.concatenate((self._occurred, np.zeros_like(self._occurred)))
        self._occurred[self._num_occurred] = token_id
        self._num_occurred += 1

    def apply(self, row: FloatRow) -> None:
        ids = self._occurred[: self._num_occurred]
        values = row[ids]
        counts = self._output_counts[ids]
        if self._repetition != 1.0:
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
        if self._frequency != 0.0:
            values -= self._frequency * counts
        if self._presence != 0.0:
            values -= self._presence * (counts > 0)
        # A small repetition penalty can overflow a large logit.
        row[ids] = np.minimum(values, _LARGEST)


class LogitEdits:
    """The edits of one slot. Holds the slot's token counts when it has penalties."""

    def __init__(
        self,
        params: SamplingParams,
        eos_ids: Sequence[int],
        logits_size: int,
        prompt_ids: npt.NDArray[np.int32],
        output_ids: npt.NDArray[np.int32],
    ) -> None:
        """prompt_ids, output_ids: int32; output_ids are the tokens already sampled (resume ids included).

        Raises ValueError when a token id of the parameters is not below `logits_size`.
        """
        self._min_tokens = params.min_tokens
        # Also with ignore_eos, as vLLM does: min_tokens asks for text, and end-of-sequence is none.
        self._stop_ids = _checked_ids("stop_token_ids", {*eos_ids, *params.stop_token_ids}, logits_size)
        bias = dict(params.logit_bias)
        self._bias_ids = _checked_ids("logit_bias", bias.keys(), logits_size)
        self._bias = np.array(list(bias.values()), np.float32)
        self._allowed: Ids | None = None
        if params.allowed_token_ids is not None:
            self._allowed = _checked_ids("allowed_token_ids", params.allowed_token_ids, logits_size)
        self._penalties: _Penalties | None = None
        if has_penalties(params):
            self._penalties = _Penalties(
                params,
                logits_size,
                _checked_ids("prompt_ids", prompt_ids, logits_size),
                _checked_ids("output_ids", output_ids, logits_size),
            )

    @property
    def fallback_id(self) -> int:
        """The token of a row in which everything is banned: the lowest allowed id, 0 without that list.

        min_tokens gives way, then; the list of allowed ids never does (unless it is empty).
        """
        return 0 if self._allowed is None or not self._allowed.size else int(self._allowed.min())

    def append(self, token_id: int) -> None:
        """Count one more output token."""
        if self._penalties is not None:
            self._penalties.append(token_id)

    def apply(self, row: FloatRow, position: int) -> bool:
        """Edit the logits float32 [logits_size] of output token `position` in place.

        Returns whether anything may have changed. Afterwards no value is NaN or +inf; every value may be -inf.
        """
        is_before_min = position < self._min_tokens
        is_masked = self._allowed is not None or (is_before_min and self._stop_ids.size > 0)
        if not (is_masked or self._bias_ids.size or self._penalties is not None):
            return False
        if self._allowed is not None:
            kept = row[self._allowed]
            row.fill(-np.inf)
            row[self._allowed] = kept
        if is_before_min:
            row[self._stop_ids] = -np.inf
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias
        if self._penalties is not None:
            self._penalties.apply(row)
        return True
