"""What the benchmarks of weight formats compute, on a tiny model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from loadtest.bench import quality
from loadtest.bench._engine import Bench
from serving.engine.limit import shape_of
from serving.engine.worker import Worker
from tests.engine.real import make_worker
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Worker]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("tiny"))
    settings: dict[str, dict[str, object]] = {
        "bf16": {},
        "fp32": {"dtype": "float32"},
        "int8": {"quantization": "int8"},
    }
    return {name: make_worker(Path(folder), max_model_len=512, **asked) for name, asked in settings.items()}


def test_the_text_is_what_its_note_says() -> None:
    text = quality.TEXT.read_bytes()
    assert (len(text), text[:40].split()) == (47_271, [b"CHAPTER", b"I"]) and b"\r" not in text
    assert hashlib.sha256(text).hexdigest() == "ceb5ce3845e8b20996eaf3f6932821cae0cc882abcca4526d746295b827a6881"


def test_scores(workers: dict[str, Worker]) -> None:
    """Two windows; the reference is its own; a model of random weights knows nothing, in any format."""
    ids = torch.randint(3, 130, (quality.WINDOW + 140,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        scores = quality.score(workers, ids)
    for score in scores.values():
        assert len(torch.cat(score.losses)) == len(ids) - 2
    assert not torch.cat(scores["bf16"].divergences).any() and torch.cat(scores["bf16"].is_same).all()
    divergences = {name: float(torch.cat(score.divergences).mean()) for name, score in scores.items()}
    assert 0 < divergences["fp32"] < divergences["int8"] < 0.5
    losses = [float(torch.cat(score.losses).mean()) for score in scores.values()]
    assert max(losses) - min(losses) < 0.2


def test_continuations_are_greedy(workers: dict[str, Worker]) -> None:
    worker = workers["bf16"]
    prompts = [Bench(worker, 256).random_prompt(seed, 20) for seed in range(3)]
    together = quality.continuations(worker, prompts, 6)
    assert [len(tokens) for tokens in together] == [6, 6, 6]
    longer = quality.continuations(worker, [prompts[1] + together[1][:2]], 4)
    assert longer[0] == together[1][2:]


def test_a_format_is_held_against_its_own_bytes(workers: dict[str, Worker]) -> None:
    plain, coded = shape_of(workers["bf16"]), shape_of(workers["int8"])
    assert plain.parameters == coded.parameters and plain.kv_bytes == coded.kv_bytes == 2
    assert plain.weight_bytes == pytest.approx(2, rel=0.02) and 1 < coded.weight_bytes < 1.1
