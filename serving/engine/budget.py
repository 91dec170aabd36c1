"""How a step's budget of tokens is shared out among its rows (C7)."""

from __future__ import annotations

import numpy as np

from serving.engine.cost import MAX_ANNOUNCED_S, StepCostModel
from serving.engine.request import Int32Array


def share_out(
    lack: Int32Array,
    contexts: Int32Array,
    *,
    max_tokens: int,
    min_chunk: int,
    cost_model: StepCostModel,
) -> Int32Array:
    """Tokens that each row computes in the next step, int32 [R].

    lack [R]: tokens that each row could compute now, rows in order of service. contexts [R]: their
    tokens computed so far. min_chunk: prompts get on by so many tokens even beside rows whose decoding
    alone takes too long.

    Rows that lack one token come first, so that a long prompt never takes another stream's turn; what
    is left, as far as the announced cost stays in bounds, goes to the others in order.
    """
    is_behind = lack > 1
    counts: Int32Array = np.where(is_behind, 0, np.minimum(lack, 1)).astype(np.int32)
    budget = max_tokens - int(counts.sum())
    if budget <= 0 or not is_behind.any():
        return counts
    context = int(contexts[is_behind].max()) + budget
    allowance = cost_model.prefill_allowance(contexts[counts > 0] + 1, context, MAX_ANNOUNCED_S)
    budget = min(budget, max(allowance, min_chunk))
    wanted = np.where(is_behind, lack, 0)
    before = np.cumsum(wanted) - wanted
    counts += np.clip(budget - before, 0, wanted).astype(np.int32)
    return counts


def take_turns(lack: Int32Array, ready: Int32Array, num_stages: int) -> Int32Array:
    """What each row may compute in the next step of a pipeline, int32 [R] (C5).

    lack [R]: as by lengths alone. ready [R]: of that, what can be sent now.

    Decoding rows form as many groups as there are stages: a step takes its share of them, the first
    that are ready, so that every stage has work. Whoever is ready gets its turn within `num_stages`
    steps, for as many steps are made of different rows. A prompt's next chunk follows the one before
    without waiting.
    """
    group = -(-int(np.count_nonzero(lack == 1)) // num_stages)
    is_decoding = ready == 1
    return np.where(is_decoding & (np.cumsum(is_decoding) > group), 0, ready).astype(np.int32)


def tokens_ahead(lack: Int32Array, ranks: np.typing.NDArray[np.int64], rank: int) -> int:
    """Tokens that go before a newcomer's of `rank`: what decodes, and what rows served earlier lack.

    lack and ranks [R], sorted by rank.
    """
    is_behind = lack > 1
    is_earlier = ranks < rank
    return int(lack[is_earlier & is_behind].sum()) + int(np.count_nonzero(lack == 1))
