"""A peer in the same run: the model of `transformers` in a bare greedy loop, without `generate`'s overhead."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any


class TransformersPeer:
    """Static batch, eager, the same weights, dtype and thread count as ours."""

    name = "transformers"

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.version = transformers.__version__
        self._torch = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def decode_step_s(self, streams: int, prompt: int, tokens: int) -> float:
        """Mean seconds of a step in which `streams` rows decode after `prompt` tokens."""
        with self._torch.inference_mode():
            ids, cache = self._prefill(streams, prompt)
            started = time.perf_counter()
            for _ in range(tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True)
                ids = out.logits[:, -1:].argmax(-1)
            return (time.perf_counter() - started) / tokens

    def prefill_s(self, length: int) -> float:
        """Seconds from a prompt to its first token."""
        with self._torch.inference_mode():
            started = time.perf_counter()
            self._prefill(1, length)
            return time.perf_counter() - started

    def _prefill(self, rows: int, length: int) -> tuple[Any, Any]:
        ids = self._torch.randint(10, 1000, (rows, length))
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values


def find_peer(folder: Path, dtype: str) -> TransformersPeer | None:
    """The peer, or None where it is not installed (it is a development dependency)."""
    return TransformersPeer(folder, dtype) if importlib.util.find_spec("transformers") else None
