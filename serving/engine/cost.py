"""What a step will cost (C7): fitted online, announced before the step runs (C13).

cost ≈ a + b·prefill tokens + c·Σ prefill·context + d·rows + e·Σ context

fitted by recursive least squares with forgetting (Ljung, System Identification, 11.2). Coefficients
are kept non-negative when predicting, so that an odd fit never promises a negative cost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]

_FORGETTING = 0.995
_MIN_SAMPLES = 16
UNLIMITED = 1 << 30
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

    def __init__(self, initial_s: float = 0.25) -> None:
        self._initial_s = initial_s
        self._weights = np.zeros(len(_SCALE))
        self._covariance = np.eye(len(_SCALE)) * 1e3
        self._num_samples = 0

    @property
    def is_fitted(self) -> bool:
        return self._num_samples >= _MIN_SAMPLES

    def observe(self, step: Features, duration_s: float) -> None:
        """Learn from one completed step."""
        gain = self._covariance @ step
        gain /= _FORGETTING + step @ gain
        self._weights += gain * (duration_s - step @ self._weights)
        self._covariance = (self._covariance - np.outer(gain, step @ self._covariance)) / _FORGETTING
        # Directions that no recent step excites would grow without bound under forgetting.
        np.clip(self._covariance, -1e6, 1e6, out=self._covariance)
        self._num_samples += 1

    def predict(self, step: Features) -> float:
        """Seconds; never less than a tenth of a millisecond."""
        if not self.is_fitted:
            return self._initial_s
        return max(1e-4, float(step @ np.maximum(self._weights, 0.0)))

    def prefill_allowance(self, contexts: npt.NDArray[np.int32], context: int, budget_s: float) -> int:
        """How many prefill tokens at `context` fit into `budget_s` beside decoding rows at `contexts`."""
        if not self.is_fitted:
            return UNLIMITED
        weights = np.maximum(self._weights, 0.0)
        per_token = float(weights[1] * _SCALE[1] + weights[2] * _SCALE[2] * context)
        if per_token <= 0.0:
            return UNLIMITED
        base = features(np.ones(len(contexts), np.int32), contexts)
        return max(0, int((budget_s - float(base @ weights)) / per_token))
