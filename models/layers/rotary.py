"""Rotary position embeddings: the tables of angles (RoFormer, Su et al. 2021)."""

from __future__ import annotations

import math

import torch

from models.config import LinearScaling, Llama3Scaling, ModelConfig, Rotary, YarnScaling


class RotaryTables:
    """A model's tables, made once and shared by its layers."""

    def __init__(self, config: ModelConfig, max_positions: int, device: torch.device) -> None:
        self._windows = config.windows
        self._table = None if config.rotary is None else cos_sin_table(config.rotary, max_positions, device)
        local = config.local_rotary
        self._local = self._table if local is None else cos_sin_table(local, max_positions, device)

    def of_layer(self, layer: int) -> torch.Tensor | None:
        """The table of a layer's attention, None where it does not rotate."""
        has_window = bool(self._windows) and self._windows[layer] > 0
        return self._local if has_window else self._table


def cos_sin_table(rotary: Rotary, max_positions: int, device: torch.device) -> torch.Tensor:
    """float32 [max_positions, size]: the cosines of size / 2 frequencies, then their sines.

    On the meta device nothing is computed.
    """
    if device.type == "meta":
        return torch.empty(max_positions, rotary.size, device=device)
    exponents = torch.arange(0, rotary.size, 2).float() / rotary.size
    frequencies = 1.0 / rotary.theta**exponents
    if isinstance(rotary.scaling, Llama3Scaling):
        frequencies = _stretched(frequencies, rotary.scaling)
    elif isinstance(rotary.scaling, LinearScaling):
        frequencies = frequencies / rotary.scaling.factor
    elif isinstance(rotary.scaling, YarnScaling):
        frequencies = _ramped(frequencies, rotary, rotary.scaling)
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if isinstance(rotary.scaling, YarnScaling):
        table *= rotary.scaling.attention_factor
    return table.to(device)


def _stretched(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1: divide frequencies whose wave is longer than the old context by `factor`, keep the
    short ones, and go smoothly from one to the other in between."""
    waves_in_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _ramped(frequencies: torch.Tensor, rotary: Rotary, scaling: YarnScaling) -> torch.Tensor:
    """YaRN: keep the frequencies that turn more than beta_fast times within the old context, divide
    those that turn less than beta_slow times by `factor`, and go linearly in their index in between."""

    def index(num_turns: float) -> float:
        """Of the frequency that turns so many times, as a real number."""
        wave = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return rotary.size * math.log(wave) / (2 * math.log(rotary.theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.size - 1)
    if low == high:
        high += 0.001  # a step, as transformers makes it
    stretched = ((torch.arange(rotary.size // 2).float() - low) / (high - low)).clamp(0, 1)
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies
