"""Where steps are computed (C5): the loop may submit step n + 1 before it has read step n."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from models.parallel import TransportError
from serving.engine.gang import Gang, GangFailed
from serving.engine.plan import Plan
from serving.engine.rank_wire import plan_frame
from serving.engine.runner import Computed, StepHandle, StepResult
from serving.engine.worker import Worker


class Executor(Protocol):
    """Runs plans in the order of submission."""

    def submit(self, plan: Plan) -> StepHandle: ...


class LocalExecutor:
    """One rank in the caller's thread. On CPU a step is over when it is submitted; a GPU goes on by itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, plan: Plan) -> StepHandle:
        return self._worker.submit(plan.encode())


class GangExecutor:
    """Rank 0's share in the caller's thread, the others' meanwhile: the same plan goes to all of them.

    With pipeline stages, `submit` returns when rank 0 has handed its stage's result on, and the step's
    handle waits for the rank that samples: steps overlap, each in another stage.
    """

    def __init__(self, worker: Worker, gang: Gang) -> None:
        self._worker = worker
        self._gang = gang

    def submit(self, plan: Plan) -> StepHandle:
        """Raises GangFailed when a rank is gone."""
        words = plan.encode()
        try:
            self._gang.tell_all(plan_frame(words))
            result = self._worker.run(words)
        except (OSError, TransportError) as error:
            raise self._gang.cause_of(error) from error
        busy_s = self._worker.runner.busy_s
        if self._worker.samples:
            return Computed(dataclasses.replace(result, busy_s=busy_s))
        return _Awaited(self._gang, int(words[0]), busy_s)


class _Awaited:
    """A step that another rank samples. Handles are read in the order of submission."""

    def __init__(self, gang: Gang, step: int, busy_s: float) -> None:
        self._gang = gang
        self._step = step
        self._busy_s = busy_s

    def result(self) -> StepResult:
        told = self._gang.results.get()
        if isinstance(told, GangFailed):
            raise told
        if told.step != self._step:
            raise RuntimeError(f"the result of step {told.step} came for step {self._step}")
        busy_s = self._busy_s + self._gang.busy_s() + told.busy_s
        return StepResult(np.frombuffer(told.ids, np.int32), told.logprobs, busy_s)
