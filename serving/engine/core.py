"""The step loop: schedule, submit, collect, emit."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from serving.engine.cost import Features, features
from serving.engine.executor import Executor
from serving.engine.limit import StepLimit
from serving.engine.output import StepOutput
from serving.engine.plan import Plan
from serving.engine.records import StepRecords
from serving.engine.runner import StepHandle
from serving.engine.scheduler import Scheduler
from serving.types import StepRecord

MIN_LIMIT_S = 1.5


class EngineCore:
    """Owns the scheduler and drives the executor in a thread of its own.

    Other threads speak to it through `call`; it speaks through `on_output` and `on_failure`, both
    called in its thread. `num_steps`, `step_started_s` and `announced_s` may be read by any thread:
    health is judged from them (C13).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        on_output: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None],
        async_depth: int = 0,
        limit: StepLimit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.limit = limit
        self.records = StepRecords()
        self.num_steps = 0
        self.step_started_s: float | None = None  # start of the loop's present turn; None = resting
        self.announced_s = 0.0
        self.tokens_per_s = 0.0  # drain rate over the last second or so
        self._executor = executor
        self._on_output = on_output
        self._on_failure = on_failure
        self._depth = async_depth
        self._clock = clock
        self._in_flight: deque[tuple[Plan, StepHandle, Features, float, float]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._last_result_s = clock()
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop after the step in progress."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the loop's thread before its next step. It must not raise."""
        self._calls.append(function)
        self._wake.set()

    @property
    def has_steps_in_flight(self) -> bool:
        return bool(self._in_flight)

    @property
    def step_age_s(self) -> float:
        """How long the present turn of the loop has taken; 0 when it rests."""
        started = self.step_started_s
        return 0.0 if started is None else max(0.0, self._clock() - started)

    @property
    def limit_s(self) -> float:
        """How old a running step may become before it counts as stalled (C13)."""
        return max(MIN_LIMIT_S, 3 * self.announced_s)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self.step_started_s = self._clock()
                self._take_calls()
                if self.scheduler.has_work or self.has_steps_in_flight:
                    self.step()
                else:
                    self._rest()
        except BaseException as failure:
            self._on_failure(failure)

    def _take_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _rest(self) -> None:
        self.step_started_s = None
        if self.scheduler.pool.num_owned:
            raise RuntimeError(f"{self.scheduler.pool.num_owned} KV blocks are owned by no request")
        if not self._calls:
            self._wake.wait()
        self._wake.clear()

    def step(self) -> None:
        """One turn: schedule, submit; collect what is due; tell the readers."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._submit(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > self._depth):
            self._on_output(self._collect())
        elif plan is None:
            # Everything waits for something outside: never spin.
            self._wake.wait(0.01)
            self._wake.clear()

    def _submit(self, plan: Plan) -> None:
        cost = features(plan.num_tokens, plan.starts + plan.num_tokens)
        announced = self.scheduler.cost_model.predict(cost)
        started = self._clock()
        # The loop's turn may wait for any step in flight; each is announced at what all stages take for it.
        self.announced_s = max([announced, *(step[-1] for step in self._in_flight)])
        self._in_flight.append((plan, self._executor.submit(plan), cost, started, announced))

    def _collect(self) -> StepOutput:
        plan, handle, cost, started, announced = self._in_flight.popleft()
        result = handle.result()
        now = self._clock()
        # With steps in flight, this one began when its predecessor ended.
        started = max(started, self._last_result_s)
        duration = now - started
        self._last_result_s = now
        self.num_steps += 1
        # In a pipeline, a step takes longer than the time since its predecessor's result says.
        self.scheduler.cost_model.observe(cost, result.busy_s or duration)
        output = self.scheduler.update(plan, result.ids, result.logprobs)
        output.record = self._record(plan, started, duration, announced, len(output.tokens))
        return output

    def _record(self, plan: Plan, started: float, duration: float, announced: float, num_tokens: int) -> StepRecord:
        num_decoding = int(np.count_nonzero(plan.num_tokens == 1))
        num_prefill = int(plan.num_tokens.sum()) - num_decoding
        ideal = math.nan
        if self.limit is not None:
            ideal = self.limit.seconds(plan.starts, plan.num_tokens, plan.num_samples, num_prefill)
        self.scheduler.tally.stepped(duration, announced, ideal, num_prefill, num_decoding)
        num_waiting, blocks_used = self.scheduler.num_waiting, self.scheduler.pool.num_owned
        self.records.append(
            plan.step,
            started,
            duration,
            announced,
            len(plan.slots),
            num_prefill,
            num_decoding,
            int((plan.starts + plan.num_tokens).sum()),
            num_waiting,
            blocks_used,
            ideal,
        )
        # Exponential average with a time constant of one second of work.
        weight = min(1.0, duration)
        self.tokens_per_s += weight * (num_tokens / max(duration, 1e-6) - self.tokens_per_s)
        return StepRecord(
            started_s=started,
            duration_s=duration,
            announced_s=announced,
            ideal_s=None if math.isnan(ideal) else ideal,
            num_rows=len(plan.slots),
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decoding,
            num_waiting=num_waiting,
            blocks_used=blocks_used,
        )
