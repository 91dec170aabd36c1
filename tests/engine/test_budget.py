"""Sharing out a step: the bounds hold for any mixture of rows."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.budget import share_out, tokens_ahead
from serving.engine.cost import StepCostModel


@pytest.mark.parametrize("seed", range(100))
def test_budget_order_and_decoding_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, 40))
    lack = rng.choice([0, 1, 1, 2, 17, 5000, 2**30], num_rows).astype(np.int32)
    contexts = rng.integers(0, 2**30, num_rows).astype(np.int32)
    max_tokens = num_rows + int(rng.integers(0, 300))
    counts = share_out(lack, contexts, max_tokens=max_tokens, min_chunk=16, cost_model=StepCostModel())
    assert counts.dtype == np.int32
    assert (counts >= 0).all() and (counts <= lack).all()
    assert (counts[lack == 1] == 1).all(), "a decoding row waits"
    assert counts.sum() == min(max_tokens, int(lack.sum(dtype=np.int64))), "budget is left while work waits"
    behind = np.flatnonzero(lack > 1)
    unfinished = [at for at in behind.tolist() if counts[at] < lack[at]]
    assert all(counts[at] == 0 for at in unfinished[1:]), "a row goes before its turn"


def test_a_newcomer_waits_for_what_is_served_before_it_only() -> None:
    lack = np.array([1, 900, 1, 0, 500], np.int32)
    ranks = np.array([10, 20, 30, 40, 50], np.int64)
    assert tokens_ahead(lack, ranks, 5) == 2
    assert tokens_ahead(lack, ranks, 45) == 902
    assert tokens_ahead(lack, ranks, 60) == 1402
    assert tokens_ahead(lack[:0], ranks[:0], 60) == 0
