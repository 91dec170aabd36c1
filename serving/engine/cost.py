"""What a step will cost (C7): fitted online, announced before the step runs (C13).

cost ≈ a + b·prefill tokens + c·Σ prefill·context + d·rows + e·Σ context

fitted by non-negative least squares over the recent past: the normal equations are kept with
forgetting (Ljung, System Identification, 11.2) and improved by a few sweeps of coordinate descent
from the last solution after every step. Three things keep it sane for as long as the replica lives:

- What is forgotten is replaced by a little of the present belief, so that knowledge never vanishes in
  a direction that no recent step excites (an hour of decoding says nothing about prompts).
- Coefficients are non-negative in the fit itself, not clipped after it: a prediction never is negative
  and the remaining coefficients make up for the bound.
- A duration far above the prediction counts as a few times the prediction. A process that was stopped
  for a minute says nothing about its steps; steps that have truly become slower get through, in turns.
"""

from __future__ import annotations

import math
import operator

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]

FIRST_PREFILL_TOKENS = 32
"""Tokens of prompts in a replica's first step: on a slow machine they must be few."""
UNLIMITED = 1 << 30
MAX_ANNOUNCED_S = 0.5
"""No step is planned to last longer (C13), nor a larger prefill tried on the strength of one that did."""

_FORGETTING = 0.995
_BELIEF = (1.0 - _FORGETTING) * 1e-3  # weight, per step, of the belief that replaces what is forgotten
_SWEEPS = 2
_MIN_SAMPLES = 16
_MAX_SURPRISE = 4.0  # times the prediction
_SCALE: Features = np.array([1.0, 1e-2, 1e-5, 1e-1, 1e-4])  # brings features to order one


def features(num_tokens: npt.NDArray[np.int32], contexts: npt.NDArray[np.int32]) -> Features:
    """num_tokens [R]: query tokens of each row; contexts [R]: context length after the step."""
    is_prefill = num_tokens > 1
    prefill = num_tokens[is_prefill].astype(np.float64)
    context = contexts.astype(np.float64)
    values = [1.0, prefill.sum(), (prefill * context[is_prefill]).sum(), len(num_tokens), context[~is_prefill].sum()]
    return np.array(values, np.float64) * _SCALE


class StepCostModel:
    """Predicts step durations in seconds. Until it has seen enough steps it announces `initial_s`."""

    def __init__(self, initial_s: float = 0.25, first_prefill: int = UNLIMITED) -> None:
        """first_prefill: tokens of prompts in a step before any such step has been observed."""
        self._initial_s = initial_s
        self._first_prefill = first_prefill
        self._weights = np.zeros(len(_SCALE))
        # Normal equations: information @ weights = evidence.
        self._information = np.eye(len(_SCALE)) * 1e-3
        self._evidence = np.zeros(len(_SCALE))
        self._num_samples = 0
        self._largest_prefill = 0  # tokens of a step that was not long

    @property
    def is_fitted(self) -> bool:
        return self._num_samples >= _MIN_SAMPLES

    def observe(self, step: Features, duration_s: float) -> None:
        """Learn from one completed step."""
        if duration_s <= MAX_ANNOUNCED_S:
            self._largest_prefill = max(self._largest_prefill, round(float(step[1] / _SCALE[1])))
        if self.is_fitted:
            duration_s = min(duration_s, max(_MAX_SURPRISE * float(step @ self._weights), 1e-3))
        self._information = _FORGETTING * self._information + np.outer(step, step)
        self._information.flat[:: len(step) + 1] += _BELIEF
        self._evidence = _FORGETTING * self._evidence + step * duration_s + _BELIEF * self._weights
        self._weights = np.array(_descend(self._information, self._evidence, self._weights.tolist()))
        self._num_samples += 1

    def predict(self, step: Features) -> float:
        """Seconds; never less than a tenth of a millisecond."""
        if not self.is_fitted:
            return self._initial_s
        return max(1e-4, float(step @ self._weights))

    def prefill_allowance(self, contexts: npt.NDArray[np.int32], context: int, budget_s: float) -> int:
        """How many prefill tokens at `context` fit into `budget_s` beside decoding rows at `contexts`.

        Never more than four times what has been seen to fit: a fit does not extrapolate further.
        """
        tried = max(self._first_prefill, 4 * self._largest_prefill)
        if not self.is_fitted:
            return tried
        per_token = float(self._weights[1] * _SCALE[1] + self._weights[2] * _SCALE[2] * context)
        base = features(np.ones(len(contexts), np.int32), contexts)
        left_s = budget_s - float(base @ self._weights)
        if left_s <= 0.0:
            return 0
        fits = left_s / per_token if per_token > 0.0 else math.inf
        return int(min(fits, tried))


def _descend(information: Features, evidence: Features, weights: list[float]) -> list[float]:
    """`weights` moved towards the non-negative solution of the normal equations, one coordinate at a time."""
    rows = list(zip(range(len(weights)), information.tolist(), evidence.tolist(), strict=True))
    for _ in range(_SWEEPS):
        for i, row, target in rows:
            rest = sum(map(operator.mul, row, weights)) - row[i] * weights[i]
            weights[i] = max(0.0, (target - rest) / row[i])
    return weights
