"""The product: the default model through Ray Serve, two replicas, in fp32 for comparison with transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from serving import config
from tests.e2e.promises import SERVES_OWN, Promises
from tests.e2e.service import Service, kill_in_the_middle, serving

pytestmark = pytest.mark.ray

MODEL = "smollm2-135m-instruct"

PROMPTS = [
    "The capital of France is",
    "In the beginning",
    "def fibonacci(n):",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "The mitochondria",
    "Roses are red,",
    "SELECT name FROM",
    "日本の首都は",
    "Es war einmal",
    "import numpy as np\n",
    "The quick brown fox",
    "To be, or not to be",
    "<html>\n<body>",
    "A recipe for bread:",
    "Newton's second law",
    "Chess is",
    "🙂 means",
    "The end.",
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("ray")
    flags = ("--replicas", "2", "--dtype", "float32", "--max-model-len", "2048", "--kv-cache-bytes", "512MiB")
    with serving(folder, *flags, timeout_s=180) as service:
        deadline = time.monotonic() + 60
        while len(service.pids()) < 2:
            assert time.monotonic() < deadline, service.replicas()
            time.sleep(0.1)
        yield service


class TestPromises(Promises):
    model = MODEL
    max_model_len = 2048
    listens_everywhere = SERVES_OWN


def test_two_replicas_serve(service: Service) -> None:
    assert len(service.pids()) == 2
    models = service.http.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [MODEL]


def test_greedy_continuations_equal_transformers(service: Service) -> None:
    """Twenty continuations of 64 tokens: each token is the argmax of transformers' logits given those before it,
    which is what greedy decoding means; four of them also against `generate` itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.store import pull

    folder = pull(MODEL, store=Path(config.load({}).store))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    oracle.generation_config.eos_token_id = None  # as ignore_eos
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for at, prompt in enumerate(PROMPTS):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        reply = service.http.post("/v1/completions", json=body | {"return_token_ids": True}).json()
        ours = reply["choices"][0]["token_ids"]
        ids = tokenizer(prompt)["input_ids"]
        assert len(ours) == 64 and reply["usage"]["prompt_tokens"] == len(ids)
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids + ours])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == ours, prompt
        if at < 4:
            whole = oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=64,
                do_sample=False,
            )
            expected = whole[0, len(ids) :].tolist()
            assert expected == ours, prompt


def test_a_killed_replica_costs_no_token(service: Service) -> None:
    kill_in_the_middle(service, MODEL, max_tokens=80)


def test_the_official_client(service: Service) -> None:
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none") as client:
        ask = {"model": MODEL, "temperature": 0.0, "max_completion_tokens": 24, "seed": 3}
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        whole = client.chat.completions.create(messages=messages, **ask)
        assert "Paris" in (whole.choices[0].message.content or "")
        parts = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **ask
            )
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content
        assert parts[-1].usage is not None and parts[-1].usage.completion_tokens == whole.usage.completion_tokens
        scored = client.completions.create(model=MODEL, prompt="One two three", max_tokens=3, logprobs=2, temperature=0)
        logprobs = scored.choices[0].logprobs
        assert len(logprobs.tokens) == 3 and all(len(top) >= 2 for top in logprobs.top_logprobs)
        several = client.completions.create(model=MODEL, prompt=["A", "B c"], n=2, max_tokens=2, seed=1)
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
