"""A real engine whose model computes garbage for one row, with and without a step in flight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serving.types import SamplingParams
from tests.engine.real import Engine, Job, alone, make_worker
from tests.tiny import tiny_model_folder


@pytest.mark.parametrize("depth", [0, 1])
def test_garbage_in_one_row_is_that_rows_end_only(tmp_path: Path, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step in flight, the faulty row's next input is no token: it used to end the whole replica."""
    worker = make_worker(tiny_model_folder(tmp_path))
    jobs = [
        Job((3, 1, 4, handle), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)) for handle in (1, 5, 9)
    ]
    wanted = alone(worker, jobs)
    forward = worker.model.forward
    num_steps = 0

    def forward_with_fault(*arguments: Any) -> torch.Tensor:
        nonlocal num_steps
        num_steps += 1
        logits = forward(*arguments)
        if num_steps == 4:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(worker.model, "forward", forward_with_fault)
    engine = Engine(worker, async_depth=depth)
    for handle, job in enumerate(jobs):
        engine.add(handle, job)
    engine.run()
    assert engine.seen[0] == wanted[0] and engine.seen[2] == wanted[2]
    assert engine.seen[1].finish is None
    assert engine.seen[1].tokens == wanted[1].tokens[:3]
    assert engine.scheduler.pool.num_owned == 0
