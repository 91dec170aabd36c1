"""Rotary position embeddings: the table of angles (RoFormer, Su et al. 2021)."""

from __future__ import annotations

import math

import torch

from models.config import Llama3Scaling, ModelConfig


def cos_sin_table(config: ModelConfig, max_positions: int, device: torch.device) -> torch.Tensor:
    """float32 [max_positions, head_size]: the cosines of head_size / 2 frequencies, then their sines."""
    exponents = torch.arange(0, config.head_size, 2).float() / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _stretched(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1: divide frequencies whose wave is longer than the old context by `factor`, keep the
    short ones, and go smoothly from one to the other in between."""
    waves_in_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
