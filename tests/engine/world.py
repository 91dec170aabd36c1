"""A scheduler and ranks without a model: tokens are a pure function of a row's history.

`FakeRanks` obeys plans exactly as a rank does (rows, block tables, positions), so a wrong block, a
skipped token or a stale row shows up as a wrong token.
"""

from __future__ import annotations

import hashlib
from collections import deque

import numpy as np

from serving.block_hash import root_hash
from serving.engine.output import StepOutput
from serving.engine.plan import Plan, decode_plan
from serving.engine.request import Request
from serving.engine.scheduler import Scheduler
from serving.types import SamplingParams

VOCAB = 97


def next_token(history: np.ndarray) -> int:
    """The token that follows `history`."""
    digest = hashlib.blake2b(history.astype(np.int32).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_output(prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    history = list(prompt)
    while len(history) < len(prompt) + max_tokens:
        history.append(next_token(np.array(history)))
        if history[-1] in stop_ids:
            break
    return history[len(prompt) :]


class FakeRanks:
    """Stores each token in its KV block and reads its context back from the block table."""

    def __init__(self, num_slots: int, max_len: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache = np.full((num_blocks, block_size), -1, np.int64)
        self.tokens = np.zeros((num_slots, max_len), np.int64)
        self.tables = np.zeros((num_slots, max_len // block_size + 1), np.int64)

    def run(self, words: np.ndarray) -> np.ndarray:
        plan = decode_plan(words)
        for row in plan.new_rows:
            self.tokens[row.slot, : len(row.tokens)] = row.tokens
        at = 0
        for slot, first, count in plan.block_updates.tolist():
            self.tables[slot, first : first + count] = plan.block_ids[at : at + count]
            at += count
        ids, inputs = [], plan.token_ids
        for slot, count, start, samples in zip(plan.slots, plan.num_tokens, plan.starts, plan.num_samples, strict=True):
            positions = np.arange(start, start + count)
            if len(plan.token_ids):  # a gang: what a rank has not sampled itself, it knows from the plan alone
                assert (self.tokens[slot, positions] == inputs[:count]).all()
                inputs = inputs[count:]
            blocks = self.tables[slot, positions // self.block_size]
            assert (blocks > 0).all(), "a token was written to the sink"
            self.cache[blocks, positions % self.block_size] = self.tokens[slot, positions]
            if samples:
                past = np.arange(start + count)
                context = self.cache[self.tables[slot, past // self.block_size], past % self.block_size]
                ids.append(next_token(context))
                self.tokens[slot, start + count] = ids[-1]
        return np.array(ids, np.int32)


class World:
    """Scheduler, ranks and readers, with `depth` further steps in flight."""

    def __init__(
        self,
        *,
        depth: int = 0,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 128,
        enable_prefix_cache: bool = True,
        num_stages: int = 0,
    ) -> None:
        """num_stages: of a pipeline, where plans carry their inputs and `depth` is one less; 0 = a single rank."""
        self.num_stages = num_stages
        self.depth = num_stages - 1 if num_stages else depth
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=block_size,
            enable_prefix_cache=enable_prefix_cache,
            num_stages=num_stages or 1,
            sends_inputs=num_stages > 0,
        )
        self.ranks = FakeRanks(max_num_seqs, max_model_len, num_blocks, block_size)
        self.in_flight: deque[tuple[Plan, np.ndarray]] = deque()
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.num_steps = 0

    def add(
        self,
        handle: int,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        resume: tuple[int, ...] = (),
        stop_ids: tuple[int, ...] = (),
        priority: int = 0,
        salt: bytes = b"",
    ) -> Request:
        request = Request(
            key=(0, handle),
            tokens=np.array([*prompt, *resume], np.int32),
            num_prompt=len(prompt),
            max_total=min(len(prompt) + max_tokens, self.scheduler.max_model_len),
            sampling=SamplingParams(max_tokens=max_tokens),
            stop_ids=stop_ids,
            priority=priority,
            root=root_hash("world", "", salt),
        )
        self.scheduler.add(request)
        self.outputs[handle] = list(resume)
        return request

    def cancel(self, handle: int) -> None:
        self.scheduler.cancel((0, handle))

    def step(self) -> StepOutput | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.num_steps += 1
            assert plan.num_tokens.sum() <= self.scheduler.max_num_batched_tokens
            if self.num_stages:
                assert len(plan.token_ids) == plan.num_tokens.sum()
                unread = [np.isin(step.slots[step.num_samples > 0], plan.slots) for step, _ in self.in_flight]
                assert not any(map(np.any, unread)), "a row is planned whose last sample is not known"
            # The ranks compute now; the scheduler learns later.
            self.in_flight.append((plan, self.ranks.run(plan.encode())))
        output = None
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            done, ids = self.in_flight.popleft()
            output = self.scheduler.update(done, ids)
            for handle, token in zip(output.handles.tolist(), output.tokens.tolist(), strict=True):
                assert handle not in self.finished, "a token after the end"
                self.outputs[handle].append(token)
            for _, handle, reason, _ in output.finished:
                self.finished[handle] = reason
            for _, handle, cached in output.admitted:
                assert handle not in self.cached, "admitted twice"
                self.cached[handle] = cached
        self.scheduler.check()
        return output

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")
