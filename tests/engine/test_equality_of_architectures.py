"""Same request, same bytes (C4) through the engine, where windows, soft caps, experts and learned positions are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, MixtralConfig

from tests.engine.real import Engine, alone, make_worker, mixed_jobs
from tests.models.architectures.parity import SIZES
from tests.tiny import tiny_checkpoint, tiny_model_folder

VOCABULARY = 320
COMMON = {**SIZES, "vocab_size": VOCABULARY, "initializer_range": 0.3, "eos_token_id": 2}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma3_text": (
        Gemma3TextConfig,
        {
            **COMMON,
            **{"head_dim": 16, "pad_token_id": 0, "sliding_window": 13, "sliding_window_pattern": 2},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        },
    ),
    "mixtral": (MixtralConfig, {**COMMON, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 21}),
    "gpt2": (
        GPT2Config,
        {
            **{"n_embd": 96, "n_layer": 3, "n_head": 6, "n_inner": 97, "n_positions": 512, "vocab_size": VOCABULARY},
            **{"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2},
        },
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tiny_model_folder(tmp_path_factory.mktemp("llama"))
    return (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_company_chunks_and_preemptions_change_nothing(family: str, tokenizer: bytes, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, *FAMILIES[family], dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    worker = make_worker(folder, dtype="bfloat16", num_threads=1)
    assert worker.found.is_exact
    jobs = mixed_jobs(random.Random(5), 12, VOCABULARY, max_prompt=40, max_tokens=90)
    undisturbed = alone(worker, jobs)
    assert len({token for transcript in undisturbed for token in transcript.tokens}) > 50
    num_preemptions = 0
    for options in ({"budget": 33, "async_depth": 1}, {"budget": 47, "num_blocks": 16, "enable_prefix_cache": False}):
        engine = Engine(worker, **options)  # type: ignore[arg-type]
        for handle, job in enumerate(jobs):
            engine.add(handle, job)
        engine.run()
        num_preemptions += sum(request.num_preemptions for request in engine.requests.values())
        for handle, expected in enumerate(undisturbed):
            seen = engine.seen[handle]
            assert (seen.tokens, seen.logprobs, seen.finish) == (expected.tokens, expected.logprobs, expected.finish)
    assert num_preemptions > 0
