"""Sampling where the logits are: tokens stay on the device for the next step, and reach the host a step later (C5).

Plain rows, greedy or random, truncated or not, are sampled by `models/ops/triton_sampling`. Rows with penalties, masks
or log-probabilities are sampled by the host's `Sampler` from their logits, which travel to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from models.ops.kernels import NUM_SAMPLING_FIELDS
from models.platform import host_buffer, mark
from serving.engine.noise import noise_bits
from serving.engine.request import Int32Array
from serving.engine.sampling_rows import EDITED, RANDOM, SCORED, SamplingRows

METHOD = "splitmix64-gumbel, splitmix64-inverse-cdf where edited or scored"
GREEDY: Int32Array = np.array([0, 0, 0, 0, *np.array([1.0, -np.inf], np.float32).view(np.int32)], np.int32)
"""What `DeviceSampler.describe` says of a row from which nothing is drawn or cut off [NUM_SAMPLING_FIELDS]."""

UNREAD = -1
"""In place of a token that only the device knows."""

_LEAST_TEMPERATURE = 1e-4
"""Below it a logit over the temperature leaves no room for noise in fp32; the host samples such rows."""


@dataclasses.dataclass(slots=True)
class DeviceSamples:
    """Of one step, in the order of its sampled rows; on their way to the host."""

    tokens: torch.Tensor  # int32 [S, 2], as `triton_sampling.sample`
    at_host: npt.NDArray[np.intp]  # rows that the host has to sample
    logits: torch.Tensor | None  # float32, of those rows
    wait: Callable[[], None]


class DeviceSampler:
    """One per engine. `latest` holds every slot's last token, and one more for padding."""

    def __init__(self, rows: SamplingRows, device: torch.device) -> None:
        from models.ops.triton_sampling import sample  # a CPU build of torch comes without Triton

        self._sample = sample
        self.latest = torch.zeros(rows.max_num_seqs + 1, dtype=torch.int32, device=device)
        self._rows = rows
        self._device = device

    @property
    def padding_slot(self) -> int:
        return self._rows.max_num_seqs

    def is_at_host(self, slots: Int32Array) -> npt.NDArray[np.bool_]:
        """Which of the rows the host samples."""
        kinds = self._rows.kind[slots]
        is_cold = (kinds & RANDOM > 0) & (self._rows.temperature[slots] < _LEAST_TEMPERATURE)
        return (kinds & (EDITED | SCORED) > 0) | is_cold

    def describe(self, slots: Int32Array, positions: Int32Array, into: Int32Array) -> None:
        """Fill `into` [NUM_SAMPLING_FIELDS, S] with what the kernels ask of each row. positions: as in `Sampler`."""
        rows = self._rows
        is_random = rows.kind[slots] & RANDOM > 0
        bits = noise_bits(rows.noise_key[slots], positions)
        into[:2] = bits.view(np.int32).reshape(-1, 2).T
        into[2] = np.where(is_random, rows.inverse_temperature[slots], np.float32(0)).view(np.int32)
        into[3] = np.where(is_random, rows.top_k[slots], 0)
        into[4] = np.where(is_random, rows.top_p[slots], 1.0).astype(np.float32).view(np.int32)
        min_p = np.where(is_random, rows.min_p[slots], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.where(min_p > 0, rows.temperature[slots] * np.log(min_p), -np.inf)
        into[5] = distance.astype(np.float32).view(np.int32)

    def launch(self, logits: torch.Tensor, described: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Queue the kernels; returns their int32 [S, 2]. described: int32 [NUM_SAMPLING_FIELDS, S or more]."""
        assert len(described) == NUM_SAMPLING_FIELDS
        return self._sample(logits, described, self._rows.tokenizer_size, slots, self.latest)

    def collect(self, logits: torch.Tensor, tokens: torch.Tensor, slots: Int32Array) -> DeviceSamples:
        """Queue the way back. Later steps may overwrite `logits` and `tokens`."""
        at_host = np.flatnonzero(self.is_at_host(slots))
        kept = host_buffer((len(slots), 2), self._device)
        kept.copy_(tokens[: len(slots)], non_blocking=True)
        rows = None
        if len(at_host):
            picked = logits.index_select(0, torch.from_numpy(at_host).to(self._device))
            rows = host_buffer(tuple(picked.shape), self._device).view(torch.float32)
            rows.copy_(picked, non_blocking=True)
        return DeviceSamples(kept, at_host, rows, mark(self._device))
