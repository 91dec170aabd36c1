"""One checkpoint computed by transformers and by us: the same logits, however the work was cut (C4, C7).

@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    Case(tiny_checkpoint(tmp_path, GPT2Config, {**FIELDS, **VARIANTS[variant]})).assert_parity(kernels)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models.ops.kernels import Kernels
from models.registry import load_config, load_model
from tests.models.paged import Sequences, advance_at_random

TOLERANCE = 1e-4
LENGTHS = (2, 17, 33, 90)
"""In tokens; blocks have 16."""

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 97,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""Of a small model in the fields of the Llama family; 8 heads, so that four ranks can share them."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 64,
}
"""With so few turns in an old context this short, the frequencies lie in all three parts of the ramp."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""int64 [length] -> [length, vocab_size]."""


def some_tokens(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[torch.Tensor]:
    """int64 [length] of every sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def transformers_logits(folder: Path, **arguments: Any) -> Logits:
    """arguments: of the forward pass. Eager throughout: faster kernels refuse unusual sizes."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    return lambda ids: model(input_ids=ids[None], use_cache=False, **arguments).logits[0]


class Case:
    """A folder, some sequences, and fp32 logits of them, transformers' unless said."""

    def __init__(self, folder: Path, lengths: Sequence[int] = LENGTHS, expected: Logits | None = None) -> None:
        """expected: in place of transformers, for what it does not compute."""
        self.folder = folder
        self.tokens = some_tokens(lengths, load_config(folder).vocab_size)
        with torch.inference_mode():
            expected = expected or transformers_logits(folder)
            self.expected: list[torch.Tensor] = [expected(ids) for ids in self.tokens]

    def assert_parity(self, kernels: Kernels, num_shuffles: int = 2) -> None:
        """Whole prompts, then chunks and decodes of all sequences mixed at random."""
        model = load_model(self.folder, dtype="float32", kernels=kernels)
        for ids, expected in zip(self.tokens, self.expected, strict=True):
            whole = Sequences(model, [ids], torch.float32)
            whole.step([(0, len(ids))])
            assert_close(whole.all_logits(0), expected)
        for seed in range(num_shuffles):
            mixed = Sequences(model, self.tokens, torch.float32, seed)
            advance_at_random(mixed, random.Random(seed), max_count=23)
            for sequence, expected in enumerate(self.expected):
                assert_close(mixed.all_logits(sequence), expected)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    difference = (ours - expected).abs().max().item()
    assert difference <= TOLERANCE, f"logits differ by {difference:.2g}"
    # Uniform logits would agree whatever the layers did.
    assert expected.std().item() > 100 * TOLERANCE
