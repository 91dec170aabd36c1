"""The scheduler (C5–C8): which rows compute how many tokens in the next step.

It reasons in lengths. Token values matter only in `update`, where a step's results arrive, up to
`async_depth` steps late: whatever a step in flight may still touch (slot, blocks) is given back
when the last such step has completed, never before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from serving.block_hash import block_hash, block_hashes
from serving.engine.blocks import BlockPool
from serving.engine.budget import share_out, take_turns, tokens_ahead
from serving.engine.cost import StepCostModel
from serving.engine.notes import Notes
from serving.engine.output import StepOutput, renumber
from serving.engine.plan import NO_IDS, NewRow, Plan
from serving.engine.request import Int32Array, Phase, Request
from serving.engine.rows import Rows, rank
from serving.engine.tally import Tally
from serving.engine.waiting import WaitingQueue
from serving.errors import InvalidRequest
from serving.types import FinishReason, Wait


class Scheduler:
    """Owns rows, blocks and the queue inside one replica. Not thread-safe: the step loop's own."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
        enable_prefix_cache: bool = True,
        cost_model: StepCostModel | None = None,
        num_stages: int = 1,
        sends_inputs: bool = False,
    ) -> None:
        """num_stages: steps that are computed at the same time, each by another pipeline stage.
        sends_inputs: plans carry token ids, so a row is planned only when its last sample is known (gangs).
        """
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) is less than max_num_seqs ({max_num_seqs})"
            )
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.rows = Rows(max_num_seqs, max_model_len)
        self.cost_model = cost_model or StepCostModel()
        self.tally = Tally()
        self._enable_prefix_cache = enable_prefix_cache
        self._num_stages = num_stages
        self._sends_inputs = sends_inputs
        self._requests: dict[tuple[int, int], Request] = {}
        self._waiting = WaitingQueue()
        self._order: Int32Array = np.zeros(0, np.int32)  # slots that may compute, first served first
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._left_slots: list[int] = []  # to be announced in the next plan
        self._entered: list[NewRow] = []  # likewise
        self._notes = Notes()
        self._next_step = 0
        self._next_sequence = 0

    # --- requests in and out --------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return self.max_num_seqs - len(self._free_slots)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(len(self._waiting) or len(self._order))

    def add(self, request: Request) -> None:
        """Queue a request. It is refused at once, with the numbers, when it can never fit.

        Raises ContextLengthExceeded or InvalidRequest.
        """
        request.check_fits(self.max_model_len, (self.pool.num_blocks - 1) * self.block_size)
        if request.key in self._requests:
            raise InvalidRequest(f"handle {request.key[1]} is in use", code="duplicate_handle")
        request.sequence = self._next_sequence
        self._next_sequence += 1
        self._requests[request.key] = request
        self._push(request)

    def cancel(self, key: tuple[int, int]) -> bool:
        """Forget a request; its blocks are free when no step in flight can touch them."""
        request = self._requests.pop(key, None)
        if request is None:
            return False
        if request.phase is Phase.WAITING:
            self._waiting.drop(request)
        else:
            self._end(request)
        return True

    def rebind(self, old: tuple[int, int], new: tuple[int, int]) -> bool:
        """Outputs of request `old` go to `new` from now on."""
        request = self._requests.pop(old, None)
        if request is None:
            return False
        request.key = new
        self._requests[new] = request
        if request.phase is Phase.RUNNING:
            self.rows.bind(request.slot, request)
        return True

    def _push(self, request: Request) -> None:
        if self._enable_prefix_cache:
            num_hashed = len(request.hashes)
            parent = request.hashes[-1] if num_hashed else request.root
            request.hashes += block_hashes(parent, request.tokens.tobytes(), self.block_size, num_hashed)
        self._waiting.push(request)

    # --- schedule -------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next step, or None when no row can compute anything now.

        There is no prefill phase and no decode phase: a row has `num_computed` tokens and must
        catch up with `num_tokens`. Decoding rows lack one token, new prompts many, resumed and
        preempted rows whatever they lost. `share_out` says who gets how much of the budget.
        """
        self._admit()
        rows, order = self.rows, self._order
        if not len(order):
            return None
        lack = rows.lack(order)
        if self._sends_inputs:
            lack = take_turns(lack, rows.ready(order), self._num_stages)
        counts = share_out(
            lack,
            rows.num_computed[order],
            max_tokens=self.max_num_batched_tokens,
            min_chunk=self.block_size,
            cost_model=self.cost_model,
        )
        self._grow_tables(order, counts)

        chosen = counts > 0
        slots, counts = order[chosen], counts[chosen]
        if self.rows.is_leaving[order].any():
            self._order = order[~rows.is_leaving[order]]
        if not len(slots):
            return None
        starts = rows.num_computed[slots]
        ends = starts + counts
        samples = rows.hand_out(slots, ends)
        updates, block_ids = rows.take_table_updates(slots)
        plan = Plan(
            step=self._next_step,
            slots=slots,
            num_tokens=counts,
            starts=starts,
            num_samples=samples,
            finished=np.array(self._left_slots, np.int32),
            block_updates=updates,
            block_ids=block_ids,
            new_rows=tuple(self._entered),
            token_ids=rows.inputs(slots, starts, counts) if self._sends_inputs else NO_IDS,
        )
        self._next_step += 1
        self._left_slots = []
        self._entered = []
        return plan

    def _grow_tables(self, order: Int32Array, counts: np.typing.NDArray[np.int32]) -> None:
        """Give every chosen row the blocks for its tokens, preempting from the back of `order`.

        Sets counts to 0 for rows that must wait. A preempted row gives its blocks back at once
        unless a step in flight still writes to them.
        """
        rows = self.rows
        needed = -(-(rows.num_computed[order] + counts) // self.block_size)
        last = len(order) - 1
        for at in np.flatnonzero((needed > rows.num_blocks[order]) & (counts > 0)).tolist():
            slot = int(order[at])
            missing = int(needed[at]) - int(rows.num_blocks[slot])
            while self.pool.num_free < missing and last >= at:
                victim = int(order[last])
                self._preempt(victim)
                counts[last] = 0
                last -= 1
                if rows.num_in_flight[victim]:
                    break  # its blocks come with the next step
            if last < at or self.pool.num_free < missing:
                counts[at] = 0
                continue
            request = self.rows.request_in(slot)
            request.blocks += self.pool.allocate(missing)
            rows.num_blocks[slot] += missing

    # --- admission ------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move requests from the queue into free slots while this step has budget for them.

        Only what is served before a request takes of its budget: it overtakes the long prompts of
        lower priority that are being computed.
        """
        if not len(self._waiting):
            return
        rows, order, num_entered = self.rows, self._order, 0
        lack, ranks = rows.num_tokens[order] - rows.num_computed[order], rows.rank[order]
        while (request := self._waiting.peek()) is not None:
            if tokens_ahead(lack, ranks, rank(request)) + num_entered >= self.max_num_batched_tokens:
                request.waits_for = Wait.BUDGET
                return
            if not self._free_slots and not self._outranks_last(request):
                request.waits_for = Wait.SLOTS
                return
            num_cacheable = (len(request.tokens) - 1) // self.block_size if self._enable_prefix_cache else 0
            hits = self.pool.match(request.hashes[:num_cacheable])
            if len(hits) < num_cacheable and self._waiting.has_leader(request, request.hashes[num_cacheable - 1]):
                request.waits_for = Wait.PREFIX
                self._waiting.stand_aside(request.hashes[num_cacheable - 1])
                continue
            total = -(-len(request.tokens) // self.block_size)
            if not self._has_room(total - len(hits), total, self.pool.num_evictable_in(hits)):
                request.waits_for = Wait.BLOCKS if self._free_slots else Wait.SLOTS
                if not self._preempt_for(request):
                    return
                continue
            self._enter(self._waiting.pop(), hits, total, num_cacheable)
            num_entered += len(request.tokens) - len(hits) * self.block_size

    def _has_room(self, num_missing: int, total: int, num_hit_free: int) -> bool:
        # A block per running row stays in reserve, or the newcomer would be preempted right away.
        reserve = min(self.num_running, self.pool.num_blocks - 1 - total)
        return bool(self._free_slots) and self.pool.num_free - num_hit_free >= num_missing + reserve

    def _outranks_last(self, request: Request) -> bool:
        return bool(len(self._order)) and self.rows.request_in(int(self._order[-1])).priority < request.priority

    def _preempt_for(self, request: Request) -> bool:
        """Make room for a request of higher priority than the last running row's."""
        if not self._outranks_last(request):
            return False
        last = int(self._order[-1])
        self._order = self._order[:-1]
        self._preempt(last)
        return bool(self.rows.num_in_flight[last] == 0)

    def _enter(self, request: Request, hits: list[int], total: int, num_cacheable: int) -> None:
        slot = self._free_slots.pop()
        self.pool.acquire(hits)
        request.blocks = hits + self.pool.allocate(total - len(hits))
        request.slot = slot
        num_cached = len(hits) * self.block_size
        self.rows.enter(slot, request, num_cached)
        self.rows.num_committed_blocks[slot] = len(hits)
        if len(hits) < num_cacheable:
            self._waiting.lead(request, request.hashes[num_cacheable - 1])
        at = int(np.searchsorted(self.rows.rank[self._order], self.rows.rank[slot]))
        self._order = np.insert(self._order, at, np.int32(slot))
        self._entered.append(NewRow(slot, request.num_prompt, request.tokens, request.sampling))
        if not request.was_admitted:
            self.tally.admitted(len(request.tokens), num_cached)
        self._notes.entered(request, num_cached)

    # --- update ---------------------------------------------------------------------------------

    def update(self, plan: Plan, ids: Int32Array, logprobs: Mapping[int, bytes] | None = None) -> StepOutput:
        """Results of a completed step, in the order in which steps were planned.

        ids: int32, the sampled tokens of the rows with num_samples > 0, negative where the row failed.
        logprobs: by index into ids.
        """
        rows = self.rows
        rows.num_in_flight[plan.slots] -= 1
        rows.num_done[plan.slots] = ends = plan.starts + plan.num_tokens
        sampling = plan.num_samples > 0
        slots, positions = plan.slots[sampling], ends[sampling]
        rows.tokens[slots, positions] = ids
        if self._sends_inputs:
            rows.num_known[slots] = positions + 1
        is_sound = ids >= 0
        live = rows.is_live[slots] & is_sound
        is_stop = (rows.stop_ids[slots] == ids[:, None]).any(axis=1)
        is_over = live & (is_stop | (positions + 1 >= rows.max_total[slots]))
        output = StepOutput(
            step=plan.step,
            connections=rows.connection[slots[live]],
            handles=rows.handle[slots[live]],
            tokens=ids[live],
            logprobs=renumber(logprobs, live) if logprobs else {},
        )
        self._notes.hand_over(output, plan, rows)
        self._commit(plan.slots)
        for at in np.flatnonzero(is_over).tolist():
            request = self.rows.request_in(int(slots[at]))
            reason = FinishReason.STOP if is_stop[at] else FinishReason.LENGTH
            output.finished.append((*request.key, reason, int(ids[at]) if is_stop[at] else -1))
            del self._requests[request.key]
            self._end(request)
        for slot in slots[rows.is_live[slots] & ~is_sound].tolist():
            request = self.rows.request_in(slot)
            output.failed.append(request.key)
            del self._requests[request.key]
            self.pool.disown(request.blocks)  # what they hold may be the cause
            self._end(request)
        self._settle(plan.slots)
        return output

    def _commit(self, slots: Int32Array) -> None:
        """Hash and share the blocks that completed steps have filled."""
        if not self._enable_prefix_cache:
            return
        rows = self.rows
        num_full = rows.num_done[slots] // self.block_size
        has_filled = num_full > rows.num_committed_blocks[slots]
        for slot, end in zip(slots[has_filled].tolist(), num_full[has_filled].tolist(), strict=True):
            request = self.rows.request_in(slot)
            for index in range(int(rows.num_committed_blocks[slot]), end):
                if index == len(request.hashes):
                    parent = request.hashes[-1] if request.hashes else request.root
                    span = rows.tokens[slot, index * self.block_size : (index + 1) * self.block_size]
                    request.hashes.append(block_hash(parent, span.tobytes()))
                self.pool.commit(request.blocks[index], request.hashes[index])
                if request.hashes[index] == request.leads:
                    self._waiting.release_followers(request)
            rows.num_committed_blocks[slot] = end

    # --- rows leaving ---------------------------------------------------------------------------

    def _preempt(self, slot: int) -> None:
        """Out of memory: the row is computed again later, from the tokens that it has by then."""
        request = self.rows.request_in(slot)
        request.is_preempting = True
        request.num_preemptions += 1
        self.tally.num_preemptions += 1
        self._notes.preempted(request, int(self.rows.num_computed[slot]))
        self._let_go(slot)

    def _end(self, request: Request) -> None:
        """No reader any more. The slot and its blocks follow when no step touches them."""
        request.phase = Phase.DONE
        self.rows.is_live[request.slot] = False
        self._order = self._order[self._order != request.slot]
        self._let_go(request.slot)

    def _let_go(self, slot: int) -> None:
        self.rows.is_leaving[slot] = True
        if self.rows.num_in_flight[slot] == 0:
            self._leave(slot)

    def _settle(self, slots: Int32Array) -> None:
        """Rows that were only waiting for their last step in flight."""
        rows = self.rows
        is_due = rows.is_leaving[slots] & (rows.num_in_flight[slots] == 0)
        for slot in slots[is_due].tolist():
            if rows.requests[slot] is not None:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        request = self.rows.request_in(slot)
        rows = self.rows
        self._waiting.release_followers(request)
        self.pool.release(request.blocks)
        request.blocks = []
        request.slot = -1
        rows.requests[slot] = None
        rows.is_live[slot] = False
        self._left_slots.append(slot)
        self._free_slots.append(slot)
        if self._entered:  # preempted or cancelled before its first step
            self._entered = [row for row in self._entered if row.slot != slot]
        if request.is_preempting and request.phase is Phase.RUNNING:
            request.is_preempting = False
            request.tokens = rows.tokens[slot, : rows.num_tokens[slot]].copy()
            self._push(request)

    # --- checks ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the conservation of blocks and slots (tests after every step; the loop when idle)."""
        self.pool.check(request.blocks for request in self._present())
        present = [request.slot for request in self._present()]
        assert sorted(present + self._free_slots) == list(range(self.max_num_seqs)), "slots are lost"
        num_waiting = sum(1 for request in self._requests.values() if request.phase is Phase.WAITING)
        assert num_waiting == len(self._waiting), "the queue lost count"

    def _present(self) -> Iterator[Request]:
        return (request for request in self.rows.requests if request is not None)
