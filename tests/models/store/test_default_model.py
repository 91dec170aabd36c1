"""The default model as `argosy pull` makes it: real English out of transformers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.store import pull

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    started = time.monotonic()
    folder = pull("smollm2-135m-instruct", store=tmp_path_factory.mktemp("store"))
    assert time.monotonic() - started < 60  # 3 s on an idle machine
    return folder


def test_it_speaks(folder: Path) -> None:
    torch.set_num_threads(1)  # two that wait for each other are slow on a busy machine
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def complete(text: str) -> str:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)
        return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    assert complete("The capital of France is").startswith(" Paris")
    turn = [{"role": "user", "content": "What is 2+3? Answer in one sentence."}]
    assert "5" in complete(str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
